"""wav2vec 2.0: a framework for self-supervised learning of speech representations (arXiv:2006.11477)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup, mean_over_processes
from fastssl.functional import gather_tokens, info_nce, sample_negatives
from fastssl.ops._precision import widen
from fastssl.train.data.draw import Draw
from fastssl.train.speech import MaskedSpeechModel

_HOTTEST, _COLDEST = 2.0, 0.5  # temperatures of the Gumbel softmax, at first and at the end


class Wav2Vec2(MaskedSpeechModel):
    """Spans of frames are hidden. For each frame in them, tell its quantised features from those of others that are
    hidden in the same recording.

    Args:
        negatives: the number of others, or as many as there are.
        temperature: of the contrastive loss.
        groups: of the quantiser, each of which has a codebook.
        codes: of a codebook, features / groups wide.
        diversity: the weight of the loss that has all codes used.
    """

    def __init__(
        self,
        *,
        mask_ratio: float = 0.5,
        span: int = 10,
        negatives: int = 100,
        temperature: float = 0.1,
        groups: int = 2,
        codes: int = 64,
        diversity: float = 0.1,
        features: int = 128,
        depth: int = 3,
    ) -> None:
        super().__init__(mask_ratio=mask_ratio, span=span, features=features, depth=depth)
        if groups < 1 or features % groups:
            raise ValueError(f"groups must divide features, {features}, got {groups}")
        self.negatives, self.temperature, self.diversity = negatives, temperature, diversity
        self.code_logits = nn.Linear(features, groups * codes)
        nn.init.normal_(self.code_logits.weight)  # else the noise alone would choose the code
        self.codebooks = nn.Parameter(torch.randn(groups, codes, features // groups))
        self.project_code = nn.Linear(features, features)
        self.project_context = nn.Linear(features, features)

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """(B, samples) int16 windows -> waveforms; mask (B, T); the places of hidden frames (B, M), and the negatives
        of each, frames of its recording (B, M, K); the quantiser's noise (B, T, groups, codes)."""
        draw = Draw.of(draw, batch)
        waveforms = self.cropped(batch, draw)
        mask = self.mask(waveforms, draw)
        hidden = mask.nonzero()[:, 1].view(len(mask), -1)
        negatives = sample_negatives(*mask.shape, self.negatives, mask=mask != 0, generator=draw.generator)
        negatives = self.steps(negatives)[mask != 0].view(*hidden.shape, -1)
        noise = -torch.empty(*mask.shape, *self.codebooks.shape[:2]).exponential_(generator=draw.generator).log()
        return waveforms, *draw.own((mask, hidden, negatives, noise))

    def forward(
        self, waveforms: Tensor, mask: Tensor, hidden: Tensor, negatives: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        """Context (B, M, features) of hidden frames; what `quantise` says of all; places and negatives."""
        seen = self.encoder.frames(waveforms)
        context = gather_tokens(self.encoder.context(seen, mask, self.mask_token), hidden)
        return self.project_context(context), *self.quantise(seen, noise), hidden, negatives

    def quantise(self, seen: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised frames (B, T, features); the number of each one's codes (B, T); and each recording's mean
        distribution over codes, without the noise (B, groups, codes).

        A code is drawn by the Gumbel softmax (arXiv:1611.01144): its gradient is that of the soft choice.
        """
        logits = widen(self.code_logits(seen)).view(noise.shape)
        soft = ((logits + noise) / (_HOTTEST * (_COLDEST / _HOTTEST) ** self.progress)).softmax(-1)
        code, (groups, codes) = soft.argmax(-1), noise.shape[2:]
        chosen = torch.zeros_like(soft).scatter(-1, code.unsqueeze(-1), 1) + soft - soft.detach()
        quantised = torch.einsum("btgv,gvd->btgd", chosen, self.codebooks.to(chosen.dtype))
        number = (code * codes ** torch.arange(groups, device=code.device)).sum(-1)
        return self.project_code(quantised.flatten(2)), number, logits.softmax(-1).mean(1)

    def loss(
        self,
        context: Tensor,
        quantised: Tensor,
        code: Tensor,
        used: Tensor,
        hidden: Tensor,
        negatives: Tensor,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        negatives = self.ids(negatives, code.shape[1])
        same = code.flatten()[negatives] == code.gather(1, hidden).view(-1, 1)  # such a frame is no negative
        contrastive = info_nce(
            context.flatten(0, 1),
            gather_tokens(quantised, hidden).flatten(0, 1),
            quantised.flatten(0, 1),
            negative_ids=negatives.masked_fill(same, -1),
            temperature=self.temperature,
        )
        return contrastive + self.diversity * (1 - self.perplexity(used, group) / used[0].numel())

    @staticmethod
    def perplexity(used: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """Of the mean distributions over codes, the sum of the codebooks': from their number to that of all codes."""
        mean = used.mean(0) if group is None else mean_over_processes(used.mean(0), group)
        return torch.special.entr(mean).sum(1).exp().sum()

    def monitored(self, context: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return (context.flatten(0, 1),)
