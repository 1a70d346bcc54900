"""lightly's losses, under their names: `fastssl.patch("lightly")` puts them in the place of lightly's."""

from fastssl.nn import (
    BarlowTwinsLoss,
    DCLLoss,
    DCLWLoss,
    DINOLoss,
    IBOTPatchLoss,
    KoLeoLoss,
    MSNLoss,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)

__all__ = [
    "BarlowTwinsLoss",
    "DCLLoss",
    "DCLWLoss",
    "DINOLoss",
    "IBOTPatchLoss",
    "KoLeoLoss",
    "MSNLoss",
    "NTXentLoss",
    "SwaVLoss",
    "VICRegLoss",
]

VERSIONS = "1.5.20", "1.7"
REPLACES = {
    "lightly.loss.barlow_twins_loss.BarlowTwinsLoss": BarlowTwinsLoss,
    "lightly.loss.dcl_loss.DCLLoss": DCLLoss,
    "lightly.loss.dcl_loss.DCLWLoss": DCLWLoss,
    "lightly.loss.dino_loss.DINOLoss": DINOLoss,
    "lightly.loss.ibot_loss.IBOTPatchLoss": IBOTPatchLoss,
    "lightly.loss.koleo_loss.KoLeoLoss": KoLeoLoss,
    "lightly.loss.msn_loss.MSNLoss": MSNLoss,
    "lightly.loss.ntx_ent_loss.NTXentLoss": NTXentLoss,
    "lightly.loss.swav_loss.SwaVLoss": SwaVLoss,
    "lightly.loss.vicreg_loss.VICRegLoss": VICRegLoss,
}
