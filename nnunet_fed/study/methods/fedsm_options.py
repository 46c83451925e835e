"""FedSM: personalized models, a global one, and a selector. Options and facts; docs/methods.md explains them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nnunet_fed.study.method_table import MethodTable


class FedSM(MethodTable):
    """Personalized models by SoftPull, a global model and a selector; see :mod:`nnunet_fed.methods.fedsm`."""

    TITLE = "FedSM"
    MODELS = 2
    SCOPES_AFTER = ("validation",)
    name: Literal["fedsm"]
    softpull_self_weight: float = Field(default=0.7, gt=0, le=1)
    """The source's lambda: weight of a site's own model in the pull, from 1/K (all equal) to 1 (no pull)."""
    softpull_schedule: Literal["lr_coupled", "constant"] = "lr_coupled"
    """``constant`` is the published code's; under nnU-Net's falling learning rate it makes all models equal."""
    gamma: float = Field(default=0.9, ge=0, le=1)
    """A case goes to a site's model if the selector's probability of that site is above it, else to the global one."""
    selector_mode: Literal["server_adam", "reference"] = "server_adam"
    """One Adam step on the sites' mean gradient, or the published code's mean of the sites' own steps."""
    selector_lr: float = Field(default=1e-2, gt=0)
    selector_patches: int = Field(default=8, ge=1)
    """At most so many patches of a case."""
    selector_steps_per_round: int = Field(default=1, ge=1)
    selector_class_balanced: bool = True
    """Every site weighs 1 in the selector's training; otherwise its number of training cases."""
    selector_header_features: bool = False
    """The selector also sees spacing, shape, mean and deviation of the image as it came."""
    selector_min_accuracy: float = Field(default=0.8, ge=0, le=1)
    """With a lower accuracy on all sites' validation cases, the super model is the global one."""
    warm_up_rounds: int = Field(default=0, ge=0)
    """So many rounds the personalized models are the global one."""
    personal_every: int = Field(default=1, ge=1)
    """The personalized model trains on every so many batches."""
    familiarity_gate: bool = True
    """Cases whose texture is unlike that of every site's images go to the global model."""
    share_personal: bool = True
    """Every site gets all personalized models at the end; otherwise a super model has its own and the global one."""
    best_model_gate: bool = False
    """Cases of a site whose personalized model is not better than the global one there go to the global one."""

    def check_sites(self, sites: tuple[str, ...]) -> None:
        """At least two, none with the global model's name, and a self-weight of at least 1/K."""
        if len(sites) < 2:
            raise ValueError("a study of FedSM needs at least two sites: it personalizes between them")
        if "global" in sites:
            raise ValueError("no site may be called 'global': it means the global model")
        if self.softpull_self_weight * len(sites) < 1:
            raise ValueError(
                f"softpull_self_weight is {self.softpull_self_weight:g}, but with {len(sites)} sites it must be at "
                f"least 1/{len(sites)}: below, a pull throws each model past the mean"
            )

    def names_in_scope(self, sites: int) -> int:
        """Besides one for each step of the selector."""
        return super().names_in_scope(sites) + self.selector_steps_per_round

    def kept_models(self, sites: int) -> int:
        """The other sites' personalized models, and a copy."""
        return sites
