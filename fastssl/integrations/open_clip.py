"""open_clip's losses, under their names: `fastssl.patch("open_clip")` puts them in the place of open_clip's, where
`open_clip.create_loss` finds them."""

from fastssl.nn import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss"]

VERSIONS = "3.0", "4.3"
REPLACES = {
    "open_clip.loss.ClipLoss": ClipLoss,
    "open_clip.loss.CoCaLoss": CoCaLoss,
    "open_clip.loss.DistillClipLoss": DistillClipLoss,
    "open_clip.loss.SigLipLoss": SigLipLoss,
}
