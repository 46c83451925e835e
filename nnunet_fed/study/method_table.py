"""What a method's table is, and what else is to be known of a method. Source of each: docs/methods.md.

pydantic only: the coordinator reads them, and it has no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from nnunet_fed.study.table import Table

MOST_NAMES = 64
"""Collectives of one scope that any method may have, and besides one for each site."""


class MethodTable(Table):
    """A method's table, and what others need to know of the method: they derive it from here, and list no methods.

    Each method has a module of its own in :mod:`nnunet_fed.study.methods`, whose class names the method in a field
    ``name: Literal["..."]``.
    """

    TITLE: ClassVar[str]
    """What people read; ``nnUNetTrainer`` and this is the trainer."""
    MODELS: ClassVar[int] = 1
    """Models with an optimizer that a site trains, or holds while it trains one."""
    DEVICE_FLOATS: ClassVar[int] = 0
    """Further numbers for each parameter in the device's memory, and in checkpoints."""
    HOST_FLOATS: ClassVar[int] = 0
    """Further numbers for each parameter in main memory, and in checkpoints."""
    NEEDS_PEERS: ClassVar[bool] = False
    """Whether sites reach each other, without the coordinator."""
    SCOPES_BEFORE: ClassVar[tuple[str, ...]] = ("start",)
    """First parts of the keys of collectives before the first round; ``-NUMBER`` may follow each."""
    SCOPES_AFTER: ClassVar[tuple[str, ...]] = ()
    """The same after the last round."""
    EXCHANGES: ClassVar[bool] = True
    """Whether the sites exchange through the coordinator at a round's end."""
    LAST_MODEL: ClassVar[str] = "global"
    """``checkpoint_{LAST_MODEL}.pth`` is the model after the rounds that is evaluated beside the deployed one."""

    if TYPE_CHECKING:
        name: str

    own_channels_option: ClassVar[str | None] = None
    """The option with which each site has input channels of its own; ``None``: the method has no such option."""

    @classmethod
    def own_trainer(cls) -> str:
        """Name of the package's trainer that does it."""
        return f"nnUNetTrainer{cls.TITLE}"

    @property
    def trainer_name(self) -> str:
        """Name of the trainer that does it."""
        return self.own_trainer()

    @property
    def fine_tuning(self) -> int:
        """Epochs of fine-tuning after the rounds."""
        return int(getattr(self, "finetune_epochs", 0))

    def kept_models(self, sites: int) -> int:
        """Further models that a site of so many keeps on disk at the end."""
        return 0

    @property
    def own_channels(self) -> bool:
        """Each site has input channels of its own: they need not agree, and are normalised by its own intensities."""
        return self.own_channels_option is not None and bool(getattr(self, self.own_channels_option))

    def names_in_scope(self, sites: int) -> int:
        """Collectives of one scope at most; of them some methods need one for each of so many sites."""
        return MOST_NAMES + sites

    def check_sites(self, sites: tuple[str, ...]) -> None:
        """See that the method suits the study's sites; raises :class:`ValueError`."""

    def check_epochs(self, epochs: int) -> None:
        """See that the method suits the study's number of epochs; raises :class:`ValueError`."""

    def check_best(self) -> None:
        """See that a round can be the best one of the federation; raises :class:`ValueError`."""
        if not self.EXCHANGES:
            raise ValueError(
                f"best = 'federation' needs rounds after which the sites have one model, or compare theirs, through "
                f"the coordinator; {self.TITLE} has none, and each site keeps its own best. Take 'best' out"
            )

    def check_cross_site(self) -> None:
        """See that a site's model can be evaluated at the others; raises :class:`ValueError`."""
        if self.own_channels:
            raise ValueError(
                f"cross_site = true does not go with {self.own_channels_option} = true: with it each site has input "
                "channels of its own, and no model takes another site's images. Take one of them out"
            )


class FineTuned(MethodTable):
    """A method after whose rounds a site may train on alone; see :mod:`nnunet_fed.trainers.parts.finetuning`."""

    finetune_epochs: int = Field(default=0, ge=0)
    """Epochs of local fine-tuning after the last round. What is deployed is the best of them by the site's own
    validation; 0: what the rounds gave."""
    finetune_lr_factor: float = Field(default=0.1, gt=0)
    """Learning rate at the start of the fine-tuning, over the study's; nnU-Net's schedule begins anew with it."""
