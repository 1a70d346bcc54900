"""Speech: how prompts are fetched and read, what frames are, what the methods predict, what finds words."""

from __future__ import annotations

import gzip
import math
import re
import wave
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("sklearn")

import fastssl.train.__main__ as command_line
from fastssl.train import DataError, Method, Run, create, fit
from fastssl.train import speech as probing
from fastssl.train.data import mel, packages, speech
from fastssl.train.data.draw import Draw
from fastssl.train.data.speech import HOP, LENGTH, RATE, Prompt, samples
from fastssl.train.networks.speech import SpeechEncoder
from tests.train.runs import QUIET, SMALL_SPEECH, spoken

TEXTS = {
    "vm-goodbye": "Good-bye!",
    "digits/7": "seven",
    "digits/8F": "[beep] Eight, (octo) l'8",
    "beep": "[this is a beep]",
    "a": "Word word",
    "b": "other: word",
}


def record(
    path: Path, seconds: float = 2.0, bits: int = 16, channels: int = 1, rate: int = RATE, seed: int = 0
) -> bytes:
    """Writes noise into a wav file; returns its samples."""
    count = round(seconds * rate) * channels * bits // 8
    noise = torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, bits // 8, rate, 0, "NONE", ""))
        file.writeframes(noise.numpy().tobytes())
    return noise.numpy().tobytes()


def debian(log: list[str]):
    """Stand-ins for apt-get and dpkg-deb: recordings in one package, texts in another."""

    def run(*command, cwd):
        log.append(command[0])
        if command[0] == "apt-get":
            (cwd / f"{command[2]}_1.6_all.deb").touch()
            return
        package = Path(command[2]).name.split("_")[0]
        recorded, language = package.endswith("-wav"), re.search("sounds-(..)", package)[1]
        fill(cwd / speech.SYSTEM_DIRECTORY.relative_to("/"), language, recorded)

    return run


def fill(root: Path, language: str, recorded: bool) -> None:
    folder, texts = speech._places(root)[list(speech.SPEAKERS).index(language)]
    if recorded:
        for i, name in enumerate(TEXTS):
            record(folder / f"{name.lower()}.wav", seed=i)
    else:
        lines = "\ufeff; Core Sounds\n\n" + "".join(f"{name}: {text}\n" for name, text in TEXTS.items())
        texts.parent.mkdir(parents=True, exist_ok=True)
        texts.write_bytes(gzip.compress(lines.encode()))


@pytest.fixture(autouse=True)
def log(monkeypatch, tmp_path):
    commands: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(speech, "SYSTEM_DIRECTORY", tmp_path / "system")
    monkeypatch.setattr(packages, "run", debian(commands))
    return commands


def test_prompts_are_fetched_once_and_used_where_they_are_installed(log):
    first = speech.load()
    assert log == ["apt-get", "dpkg-deb"] * 10
    again = speech.load()
    assert len(log) == 20 and torch.equal(again.train, first.train)
    cache = next(Path(packages.cache_folder("asterisk")).iterdir())
    cache.unlink()
    for language in speech.SPEAKERS:
        for recorded in (True, False):
            fill(speech.SYSTEM_DIRECTORY, language, recorded)
    assert torch.equal(speech.load().train, first.train) and len(log) == 20


def test_words_samples_and_what_is_held_out(tmp_path):
    data = speech.load()
    assert {p.speaker for p in data.prompts} == set(speech.SPEAKERS.values())
    words = [frozenset(x) for x in ({"good", "bye"}, {"seven"}, {"eight", "l", "8"}, {"word"}, {"other", "word"})]
    for speaker in speech.SPEAKERS.values():
        prompts = [p for p in data.prompts if p.speaker == speaker]
        assert {p.words for p in prompts} == set(words)  # a beep has none
        assert [p.tested for p in prompts] == [p.tested for p in data.prompts[: len(prompts)]]
        (goodbye,) = (p for p in prompts if "bye" in p.words)
        assert goodbye.waveform.numpy().tobytes() == record(tmp_path / "x.wav", seed=0)
    assert 0 < sum(p.tested for p in data.prompts) < len(data.prompts)
    whole = torch.cat([p.waveform for p in data.prompts if not p.tested])
    length = samples(speech.FRAMES + speech.MARGIN)
    for i, window in enumerate(data.train):
        assert torch.equal(window, whole[i * speech.FRAMES * HOP :][:length])
    assert len(data.train) == 1 + (len(whole) - length) // (speech.FRAMES * HOP)


def test_a_folder_of_ones_own(tmp_path):
    root = tmp_path / "mine"
    for i in range(9):
        record(root / "anna" / "deep" / f"{i}.wav", seed=i)
        record(root / "ben" / f"{i}.wav", seed=i)
    record(root / "ben" / "short.wav", seconds=0.05)
    (root / "anna.txt").write_text("deep/1: One\ndeep/3: Three, three\n")
    data = speech.load(root)
    assert data.name == "mine"
    said = {(p.speaker, p.words) for p in data.prompts}
    assert said == {("anna", frozenset({"one"})), ("anna", frozenset({"three"})), ("ben", frozenset())}
    assert len(data.prompts) == 2 + 9
    with pytest.raises(DataError, match="deep must have 5.0 seconds to learn from, got 0.0"):
        speech.load(root / "anna" / "deep")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"rate": 16000}, "must have 16 bits, one channel and 8000 samples a second, got 16, 1 and 16000"),
        ({"channels": 2}, "got 16, 2 and 8000"),
        ({"bits": 8}, "got 8, 1 and 8000"),
    ],
)
def test_recordings_of_other_kinds_are_refused(tmp_path, kind, message):
    record(tmp_path / "mine" / "anna" / "x.wav", **kind)
    with pytest.raises(DataError, match=rf"x.wav must have .*{message}|x.wav {message}"):
        speech.load(tmp_path / "mine")


def test_what_is_no_recording_or_no_text(tmp_path):
    path = tmp_path / "mine" / "anna" / "x.wav"
    record(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match="x.wav cannot be read as a wav file"):
        speech.load(tmp_path / "mine")
    (tmp_path / "mine" / "anna.txt").write_bytes(b"x: \xff\xfe")
    with pytest.raises(DataError, match="anna.txt cannot be read as a text"):
        speech.load(tmp_path / "mine")


def test_packages_that_cannot_be_had_or_lack_recordings(monkeypatch, tmp_path):
    def missing(*command, cwd):
        raise DataError(f"{command[0]} is not installed")

    everything = packages.run
    monkeypatch.setattr(packages, "run", missing)
    with pytest.raises(DataError, match="prompts are in Debian's asterisk-core-sounds-., but apt-get is not installed"):
        speech.load()
    monkeypatch.setattr(packages, "run", everything)
    monkeypatch.setitem(globals(), "fill", lambda root, language, recorded: None)
    with pytest.raises(DataError, match="must have recordings of en_US_f_Allison, .*, ru_RU_f_IvrvoiceRU$"):
        speech.load()
    assert not (tmp_path / "home" / "fastssl" / "asterisk").exists()


def test_frames_of_the_encoder_and_of_mel_energies_are_the_same():
    torch.manual_seed(0)
    waveforms = torch.randn(2, samples(9), dtype=torch.float64)
    encoder = SpeechEncoder(16, 1).double()
    frames = encoder.frames(waveforms)
    assert frames.shape == (2, 9, 16) and speech.frames(waveforms) == 9 == mel.log_mel(waveforms.float()).shape[1]
    changed = waveforms.clone()
    changed[:, : 3 * HOP] = changed[:, 3 * HOP + LENGTH :] = 7.0
    same = [torch.equal(encoder.frames(changed)[:, t], frames[:, t]) for t in range(9)]
    assert same == [t == 3 for t in range(9)]
    energies, other = mel.log_mel(waveforms.float()), mel.log_mel(changed.float())
    torch.testing.assert_close(other[:, 3], energies[:, 3])
    assert not torch.allclose(other[:, 2], energies[:, 2])
    changed = waveforms.float()
    changed[:, 3 * HOP :][:, : (LENGTH - 256) // 2] = changed[:, 3 * HOP + (LENGTH + 257) // 2 :] = 7.0
    torch.testing.assert_close(mel.log_mel(changed)[:, 3], energies[:, 3])  # the middle of a frame


def test_a_recurrent_encoder_hears_only_the_past_and_a_transformer_everything():
    torch.manual_seed(0)
    waveforms = torch.randn(1, samples(9))
    changed = waveforms.clone()
    changed[:, 4 * HOP + LENGTH :] += 1
    for depth, hears in ((0, False), (1, True)):
        encoder = SpeechEncoder(16, depth)
        difference = (encoder(changed) - encoder(waveforms)).abs().amax((0, 2))
        assert (difference[:5].max() > 1e-6) == hears and difference[6:].min() > 1e-6


def test_mel_energies_find_a_tone_and_mfccs_are_their_cosine_transform():
    from scipy.fft import dct

    time = torch.arange(samples(12)) / RATE
    for hertz in (300, 1000, 3000):
        waveforms = speech.to_float(10_000 * torch.sin(2 * math.pi * hertz * time).expand(1, -1))
        energies = mel.log_mel(waveforms)
        centre = 2595 * math.log10(1 + hertz / 700) / (2595 * math.log10(1 + RATE / 2 / 700)) * (mel.BANDS + 1) - 1
        assert (energies.argmax(-1) - centre).abs().max() <= 0.7
    noise = torch.randn(2, samples(12), generator=torch.Generator().manual_seed(0))
    first = torch.from_numpy(dct(mel.log_mel(noise).numpy(), type=2, axis=-1)[..., :13]) / 2

    def differences(x):
        return torch.stack([(x[:, min(t + 1, 11)] - x[:, max(t - 1, 0)]) / 2 for t in range(12)], 1)

    expected = torch.cat([first, differences(first), differences(differences(first))], 2)
    expected = (expected - expected.mean(1, keepdim=True)) / (
        expected.var(1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(mel.mfcc(noise), expected, rtol=1e-3, atol=1e-3)
    assert mel.mfcc(torch.zeros(1, samples(12))).isfinite().all()


def new(name: str, **options) -> Method:
    torch.manual_seed(0)
    return create(name, 4, **SMALL_SPEECH, **options)


def inputs_of(method: Method, rows: int = 5) -> tuple[torch.Tensor, ...]:
    return method.views(spoken(40)[:rows], torch.Generator().manual_seed(0))


def test_cpc_tells_the_frame_to_come_from_others_of_the_recording():
    method = new("cpc", ahead=3, negatives=4)
    waveforms, negatives = inputs_of(method)
    frames = 16
    assert waveforms.shape == (5, samples(frames)) and negatives.shape == (5, frames, 4)
    assert ((negatives >= 0) & (negatives < frames) & (negatives != torch.arange(frames)[:, None])).all()
    predictions, heard, _ = method(waveforms, negatives)
    context, losses = method.encoder(waveforms), []
    torch.testing.assert_close(heard, method.encoder.frames(waveforms))
    for step in (1, 2, 3):
        weight = method.predictors.weight.view(3, 16, 16)[step - 1]
        for b in range(5):
            for t in range(frames - step):
                others = heard[b, negatives[b, t + step]]
                logits = torch.cat([heard[b, t + step][None], others]) @ (weight @ context[b, t])
                losses.append((step, -logits.log_softmax(0)[0]))
    expected = torch.stack([torch.stack([x for s, x in losses if s == step]).mean() for step in (1, 2, 3)]).mean()
    torch.testing.assert_close(method.loss(predictions, heard, negatives), expected)


def test_wav2vec2_tells_a_hidden_frames_code_from_those_of_others_that_are_hidden():
    method = new("wav2vec2", negatives=5, temperature=0.2, diversity=0.3, codes=3)
    waveforms, mask, hidden, negatives, noise = inputs_of(method)
    assert mask.sum(1).tolist() == [8] * 5 and noise.shape == (5, 16, 2, 3)
    context, quantised, code, used, *_ = method(waveforms, mask, hidden, negatives, noise)
    whole = method.project_context(method.encoder.context(method.encoder.frames(waveforms), mask, method.mask_token))
    losses, dropped = [], 0
    for b in range(5):
        assert hidden[b].tolist() == mask[b].nonzero().flatten().tolist()
        for m, t in enumerate(hidden[b].tolist()):
            ids = negatives[b, m].tolist()
            assert len(set(ids)) == 5 and all(mask[b, i] and i != t for i in ids)
            others = [i for i in ids if code[b, i] != code[b, t]]
            dropped += len(ids) - len(others)
            keys = torch.stack([quantised[b, t], *(quantised[b, i] for i in others)])
            losses.append(-(F.cosine_similarity(whole[b, t][None], keys) / 0.2).log_softmax(0)[0])
    probability = used.mean(0)
    perplexity = (-(probability * probability.log()).sum(1)).exp().sum()
    expected = torch.stack(losses).mean() + 0.3 * (6 - perplexity) / 6
    assert dropped
    torch.testing.assert_close(method.loss(context, quantised, code, used, hidden, negatives), expected)


def test_wav2vec2_quantises_by_the_code_that_is_likeliest_with_the_noise():
    method = new("wav2vec2", codes=4)
    waveforms, *_, noise = inputs_of(method)
    seen = method.encoder.frames(waveforms).detach()
    for progress, temperature in ((0.0, 2.0), (0.5, 1.0), (1.0, 0.5)):
        method.progress, logits = progress, method.code_logits(seen).unflatten(2, (2, 4))
        quantised, code, used = method.quantise(seen, noise)
        first, second = (logits + noise).argmax(3).unbind(2)
        assert torch.equal(code, first + 4 * second)
        chosen = torch.cat([method.codebooks[0][first], method.codebooks[1][second]], 2)
        torch.testing.assert_close(quantised, method.project_code(chosen))
        torch.testing.assert_close(used, logits.softmax(3).mean(1))
        soft = ((logits + noise) / temperature).softmax(3)
        soft_quantised = method.project_code(torch.einsum("btgv,gvd->btgd", soft, method.codebooks).flatten(2))
        gradients = (torch.autograd.grad(x.sum(), method.code_logits.weight)[0] for x in (quantised, soft_quantised))
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(noise.mean(), torch.tensor(0.5772), atol=0.2, rtol=0)  # Gumbel's


def test_hubert_tells_the_units_of_hidden_frames():
    method = new("hubert", units=7, temperature=0.2)
    waveforms, mask, units = inputs_of(method)
    features, _ = method(waveforms, mask, units)
    nearest = torch.cdist(mel.mfcc(waveforms), method.centroids).argmin(2)
    assert torch.equal(units, nearest.where(mask != 0, -100)) and mask.sum(1).tolist() == [8] * 5
    logits = F.cosine_similarity(features.unsqueeze(2), method.units, dim=3) / 0.2
    torch.testing.assert_close(method.loss(features, units), F.cross_entropy(logits[mask != 0], units[mask != 0]))


@pytest.mark.parametrize("name", ["wav2vec2", "hubert"])
def test_hidden_frames_are_not_seen(name):
    method = new(name)
    waveforms, *_ = inputs_of(method)
    mask = method.mask(waveforms, Draw(torch.Generator().manual_seed(0), len(waveforms)))
    frames = method.encoder.frames(waveforms)
    context = method.encoder.context(frames, mask, method.mask_token)
    changed = frames.where(mask.unsqueeze(2) == 0, 7.0)
    torch.testing.assert_close(method.encoder.context(changed, mask, method.mask_token), context)
    assert not torch.allclose(method.encoder.context(frames), context)


def test_hubert_learns_its_units_from_the_data_and_keeps_them():
    windows = spoken(40)
    data = speech.Speech("noise", windows, [])
    torch.manual_seed(0)
    method = create("hubert", 30, data, units=6, **SMALL_SPEECH)
    coefficients = mel.mfcc(speech.to_float(windows)).flatten(0, 1)
    distances = torch.cdist(coefficients, method.centroids)
    means = torch.stack([coefficients[distances.argmin(1) == k].mean(0) for k in range(6)])
    assert (means - method.centroids).norm() < 0.1 * method.centroids.norm()
    assert torch.equal(create("hubert", 30, data, units=6, **SMALL_SPEECH).centroids, method.centroids)
    run = Run(batch_size=10, steps=20, learning_rate=1e-2)
    history = fit({"m": method}, data.train, run, console=QUIET)["m"]
    assert history[-1].loss < 0.9 * history[0].loss


@pytest.mark.parametrize("name", ["cpc", "wav2vec2", "hubert"])
def test_everything_learns_and_losses_are_float32_under_amp(name):
    method = new(name)
    inputs = inputs_of(method)
    method.loss(*method(*inputs)).backward()
    trained = {key: p.grad for key, p in method.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained.values())
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = method(*inputs)
        loss = method.loss(*embeddings)
    assert loss.dtype == torch.float32 and loss.isfinite()
    others = method.views(spoken(40)[:5], torch.Generator().manual_seed(1))
    assert not torch.equal(inputs[0], others[0]) and (name == "cpc" or not torch.equal(inputs[1], others[1]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cpc", {"ahead": 200}, "ahead must be below 200, got 200"),
        ("hubert", {"mask_ratio": 0.0}, "mask_ratio must hide at least one of 200 frames, got 0.0"),
        ("wav2vec2", {"mask_ratio": 1.1}, "mask_ratio must hide at least one of 200 frames, got 1.1"),
        ("hubert", {"span": 201}, "span must be from 1 to 200, got 201"),
        ("wav2vec2", {"groups": 3}, "groups must divide features, 128, got 3"),
        ("cpc", {"features": 20}, "features must be a multiple of 8, got 20"),
    ],
)
def test_options_that_fit_nothing(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, 4, **options)


def test_batches_of_speech_and_text_are_small_by_default():
    parser = command_line._parser()
    assert [parser.parse_args([name]).batch_size for name in ("cpc", "hubert", "gpt", "simclr")] == [16, 16, 64, 1024]


def prompts(words_of, speakers=("a", "b"), count: int = 80) -> list[Prompt]:
    return [
        Prompt(speaker, frozenset(words_of(speaker, i)), torch.zeros(0), i % 4 == 3)
        for speaker in speakers
        for i in range(count)
    ]


def test_words_are_found_where_features_tell_them_and_by_chance_otherwise():
    """Word x is in half of the prompts, y in a quarter of one speaker's, and z in too few to count."""
    said = prompts(lambda speaker, i: ["x"] * (i % 8 > 3) + ["y"] * (speaker == "a" and i % 16 < 4) + ["z"] * (i < 8))
    features = torch.tensor([["x" in p.words, "y" in p.words, p.speaker == "a"] for p in said]).float()
    features += 0.01 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    precision, chance, count = probing.words_found(said, features)
    assert (precision, count) == (1.0, 3) and chance == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    noise = torch.randn(len(said), 3, generator=torch.Generator().manual_seed(1))
    assert probing.words_found(said, noise)[0] < 0.75
    swapped = torch.where(torch.tensor([[p.tested] for p in said]), -features, features)
    assert probing.words_found(said, swapped)[0] < 0.6  # what is learned is asked of others


def test_features_of_prompts_are_those_of_each():
    generator = torch.Generator().manual_seed(0)
    lengths = [2500, 1999, 8000, 2000, 700, 2600]
    said = [
        Prompt("a", frozenset(), torch.randint(-999, 999, (n,), generator=generator).short(), False) for n in lengths
    ]
    found = probing.of_prompts(said, lambda x: torch.stack([x[:, 0], (x != 0).sum(1), x.square().sum(1)], 1), 2)
    for row, prompt in zip(found, said, strict=True):
        waveform = speech.to_float(prompt.waveform)
        expected = torch.stack([waveform[0], (waveform != 0).sum(), waveform.square().sum()])
        torch.testing.assert_close(row, expected)
    shapes = []
    probing.of_prompts(said, lambda x: shapes.append(tuple(x.shape)) or x[:, :1], 2)
    assert shapes == [(2, 2000), (1, 2000), (2, 4000), (1, 8000)]


def test_evaluation_says_what_it_is_compared_with(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    said = [
        Prompt(
            "a",
            frozenset({"x", "y"} if i % 2 else {"y"}),
            torch.randint(-9, 9, (LENGTH + 99,), generator=generator).short(),
            i % 4 > 1,
        )
        for i in range(48)
    ]
    method = new("cpc")
    ((test, value),) = method.evaluate(speech.Speech("noise", spoken(4), said)).items()
    assert re.fullmatch(
        r"mean average precision of 1 words in held-out prompts \(log-mel statistics [\d.]+%, chance 50.0%\)", test
    )
    assert 0 < value <= 1 and method.training
    ((test, value),) = method.evaluate(
        speech.Speech("noise", spoken(4), [p._replace(words=frozenset()) for p in said])
    ).items()
    assert test == "effective rank, of 16 dimensions" and 1 / 16 <= value <= 1
