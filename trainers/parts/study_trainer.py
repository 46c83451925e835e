"""nnU-Net's trainer with the settings of a study, and checkpoints that a killed training goes on from exactly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from pydantic import ValidationError
from torch._dynamo import OptimizedModule

from nnunet_fed.agreement.fingerprint_files import OWN, put_own_in_place, without_cases
from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.exchange.payload import Array
from nnunet_fed.files import write_json
from nnunet_fed.methods.fedavg import site_weight
from nnunet_fed.methods.tensors import load_arrays, shared_tensors, to_arrays
from nnunet_fed.study.federation import Federation, Fold, study_in
from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.custom_options import Custom
from nnunet_fed.study.site import Site
from nnunet_fed.study.toml import explain
from nnunet_fed.trainers.parts import checkpoint, warm_up
from nnunet_fed.trainers.parts.base_trainer import BASE_TRAINER, STOCK, base_of, code_digest, compose
from nnunet_fed.trainers.parts.cascade import predicting_next_stages, require_previous_stage
from nnunet_fed.trainers.parts.lesion_report import evaluate_lesions
from nnunet_fed.trainers.parts.own_cases import require_preprocessed
from nnunet_fed.trainers.parts.sentences import sentences_for_users
from nnunet_fed.trainers.parts.site_tracker import SiteTracker
from nnunet_fed.trainers.parts.training_record import logged_by

THREADS_VARIABLE = "nnUNet_fed_threads"
"""Number of torch's threads; stock nnU-Net takes every core for each process on the CPU."""
SKIP_VALIDATION_VARIABLE = "nnUNet_fed_skip_validation"
Step = Callable[[torch.Tensor, Any], Any]


def _all_in(transform: Any) -> Iterator[Any]:
    """A transform, and those that it is made of."""
    yield transform
    several = (*getattr(transform, "transforms", ()), *getattr(transform, "list_of_transforms", ()))
    for part in (*several, getattr(transform, "transform", None)):
        if part is not None:
            yield from _all_in(part)


class StudyTrainer(nnUNetTrainer):
    """What a federated trainer is without the other sites: what averaging and gossip share.

    It builds on :attr:`base_trainer`: whatever it does not do itself goes there, by ``super()``.
    """

    method: ClassVar[str]
    """Name of the method, as in the study's table."""
    Options: ClassVar[type[MethodTable]] = MethodTable
    """The method's table. A trainer that sets it says with ``options: ...`` what it is, for whoever reads types."""
    options: MethodTable
    """The method's options, as the study has them."""
    PREDICTED_AS: ClassVar[str | None] = None
    """The trainer that checkpoints name, for a network of the method's own; ``None``: it is the base trainer's, and so
    nnU-Net predicts without nnunet_fed."""
    HOLDS_OPTIMIZER: ClassVar[str | None] = None
    """Why no other optimizer may take the place of the first one while the training runs, to go on after "it"."""

    current_epoch: int
    fold: Fold
    network: Any
    optimizer: Any
    lr_scheduler: Any
    grad_scaler: Any
    preprocessed_dataset_folder_base: str
    _cleanup: ExitStack
    """What ends once nnU-Net has copied the fingerprint."""
    _best_ema: float | None

    def __new__(cls, plans: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        """A trainer that builds on the base trainer of the study in the plans."""
        with sentences_for_users():
            return super().__new__(compose(cls, base_of(study_in(plans))))

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's own signature, which it inspects)
    ):
        with sentences_for_users():
            self.study = study_in(plans)
            self.options = self.options_of(self.study)
        with sentences_for_users():
            super().__init__(
                plans=plans, configuration=configuration, fold=fold, dataset_json=dataset_json, device=device
            )  # fmt: skip
        own_epochs = self.num_epochs
        if self.device.type == "cpu" and os.environ.get(THREADS_VARIABLE):
            torch.set_num_threads(int(os.environ[THREADS_VARIABLE]))
        self.tracker: SiteTracker | None = None
        self.own_site = cache(Site.from_environment)
        """This site's settings, which are read once in a training: somebody may edit site.toml meanwhile. A function:
        nnU-Net writes all other attributes down, and ``--val`` needs no site.toml."""
        self._training_cases = 0
        self._resumed: dict[str, Any] | None = None
        with sentences_for_users():
            self.take_study()
        if self.base_trainer is not STOCK:
            self.print_to_log_file(
                f"This training builds on {self.base_trainer.__name__}, whose own {own_epochs} epochs do not count: it "
                f"is the study that decides, {self.num_epochs} epochs of {self.num_iterations_per_epoch} iterations."
            )

    @property
    def base_trainer(self) -> type[Any]:
        """nnU-Net's trainer on which this one builds."""
        return next(part for part in type(self).__mro__ if not issubclass(part, StudyTrainer))

    @classmethod
    def check_base(cls, base: type[Any]) -> None:
        """See that the method goes with a base trainer; raises :class:`ConfigurationError` that says why not.

        Args:
            base: a class of nnU-Net's.
        """
        compose(cls, base)

    def compared_of_base(self) -> dict[str, str]:
        """What must be equal at all sites of the base trainer that the study names; nothing of nnU-Net's own."""
        return {BASE_TRAINER: code_digest(self.base_trainer)} if self.study.names_trainer else {}

    def take_study(self) -> None:
        """Begin with the study: :meth:`configure_study`, and note the number of epochs that it gave."""
        self.configure_study()
        self._epochs: int = self.num_epochs

    def configure_study(self) -> None:
        """Take what the trainer needs from the study; raises :class:`FederationError`.

        It is called at the end of construction, and again before a second :meth:`initialize`, when a site starts anew
        (:mod:`nnunet_fed.trainers.parts.starting_anew`): all that a method keeps begins in these two.
        """
        if self.study.initial_lr is not None:
            self.initial_lr = self.study.initial_lr
        self.num_iterations_per_epoch = self.study.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.study.val_iterations_per_epoch
        self.num_epochs = self.study.epochs
        self.save_every = self.study.local_epochs

    @classmethod
    def options_of(cls, study: Federation) -> Any:
        """The method's options in a study; those of a method from outside the package are checked by :attr:`Options`.

        Raises:
            ConfigurationError: the study is of another method, or trainer, or the options are not this one's.
        """
        table = study.method
        if table.name != cls.method or (table.name == "custom" and table.trainer_name != cls.__name__):
            asked = f"the trainer '{table.trainer_name}'" if table.name == "custom" else f"the method '{table.name}'"
            raise ConfigurationError(
                f"The study '{study.name}', for which the plans were made, is of {asked}; '{cls.__name__}' does the "
                f"method '{cls.method}'. Use the trainer that goes with it, or plan for another study."
            )
        if not isinstance(table, Custom):
            return table
        try:
            return cls.Options.model_validate(table.options)
        except ValidationError as error:
            raise ConfigurationError(
                f"The options of '{cls.__name__}' in the study '{study.name}': {explain(error, cls.Options)}"
            ) from None

    # ------------------------------------------------------------------------------------------- for the methods

    def method_state(self) -> dict[str, Any]:
        """The method's own state, for the checkpoint; part of what a resumed training must have to send the same."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`; the network and the optimizer are restored already."""

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint holds besides nnU-Net's own."""
        return {"random": checkpoint.random_states(), "method": self.method_state()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`training_state`; the random states wait until the training has started."""
        self.load_method_state(state["method"])

    @staticmethod
    def bare(network: torch.nn.Module) -> torch.nn.Module:
        """A network without the wrappers of ``DistributedDataParallel`` and ``torch.compile``."""
        if isinstance(network, torch.nn.parallel.DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    @property
    def shared_network(self) -> torch.nn.Module:
        """The network whose tensors the sites share: the one that is trained, unless a method has another."""
        return self.bare(self.network)

    def shared(self) -> dict[str, torch.Tensor]:
        """The tensors that this site shares, by name."""
        return shared_tensors(self.shared_network)

    def shared_arrays(self) -> dict[str, Array]:
        """The tensors that this site shares, as arrays."""
        return to_arrays(self.shared())

    def load_shared(self, arrays: dict[str, Array]) -> None:
        """Take received tensors into the network, in place."""
        load_arrays(self.shared(), arrays)

    @property
    def site_weight(self) -> float:
        """This site's weight in a mean."""
        return site_weight(self.study.weighting, self._training_cases)

    @property
    def initial_seed(self) -> int:
        """From which the network is built and everything else is drawn."""
        return self.study.seed

    def steps(self) -> dict[str, Step]:
        """What a training step computes before its backward pass, by the name of the phase that has such steps.

        ``nnunet_fed check`` reckons their memory (:mod:`nnunet_fed.trainers.parts.step_memory`). Each is called with
        images and targets, and returns all that waits for a backward pass at once.
        """
        return {"training": lambda data, target: self.loss(self.network(data), target)}

    # ------------------------------------------------------------------------------------------- nnU-Net's hooks

    def initialize(self) -> None:
        """Build the network from the study's seed, once it is sure that there are preprocessed cases.

        A base trainer that does not go with the plans ends the process with a sentence.
        """
        with sentences_for_users():
            require_preprocessed(self)
            checkpoint.seed_everything(self.initial_seed + self.local_rank)
            self.num_epochs = self._epochs  # whatever a class has set since that stands before this one
            try:
                super().initialize()
            except FederationError:
                raise
            except Exception as error:  # whatever a class of the user's does
                if self.base_trainer is STOCK:
                    raise
                raise ConfigurationError(
                    f"The trainer '{self.base_trainer.__name__}', which the study names, cannot train the "
                    f"configuration {self.configuration_name} of these plans: {type(error).__name__}: {error}. Plan "
                    "for a study that names another trainer or configuration."
                ) from error

    def configure_optimizers(self, *stage: Any) -> Any:
        """The base trainer's optimizer and schedule, with the study's momentum.

        Args:
            stage: what the base trainer's takes besides.

        Raises:
            ConfigurationError: the study says a momentum, and the optimizer has none.
        """
        optimizer, schedule = super().configure_optimizers(*stage)
        if self.study.momentum is not None:
            if not all("momentum" in group for group in optimizer.param_groups):
                raise ConfigurationError(
                    f"The study sets momentum = {self.study.momentum:g}, but {type(optimizer).__name__}, the optimizer "
                    f"of '{self.base_trainer.__name__}', has none. Leave momentum out of federation.toml."
                )
            for group in optimizer.param_groups:
                group["momentum"] = self.study.momentum
        return optimizer, schedule

    def get_training_transforms(self, *arguments: Any, **options: Any) -> Any:
        """The base trainer's augmentation, the same whenever it is repeated (rule 7 of the protocol).

        nnU-Net's blur takes the faster of two ways by a stopwatch, and their results differ in the last bits. Here it
        takes the direct one, which is the faster one for nnU-Net's kernels of at most 7 voxels.
        """
        transforms = super().get_training_transforms(*arguments, **options)
        for transform in _all_in(transforms):
            if isinstance(transform, GaussianBlurTransform):
                transform.benchmark = False
        return transforms

    def on_train_epoch_start(self) -> None:
        """The base trainer's.

        Raises:
            ConfigurationError: it takes another optimizer, which the method does not follow.
        """
        warm_up.leave_if_over(self)
        before = self.optimizer
        super().on_train_epoch_start()
        if self.HOLDS_OPTIMIZER and self.optimizer is not before:
            raise ConfigurationError(
                f"The trainer '{self.base_trainer.__name__}' takes a new optimizer in epoch {self.current_epoch}, "
                f"which '{type(self).__name__}' cannot follow: it {self.HOLDS_OPTIMIZER}. Plan for a study of another "
                "method or trainer."
            )

    def on_train_start(self) -> None:
        """nnU-Net's start, then TensorBoard if site.toml asks for it: its thread must not be there at a fork."""
        if self.local_rank == 0:
            with suppress(OSError):  # the folder may be another user's
                put_own_in_place(Path(self.preprocessed_dataset_folder_base))
        super().on_train_start()
        going_on = self.current_epoch < self.num_epochs  # a finished training needs no site.toml
        if self.local_rank == 0 and going_on and self.own_site().tensorboard:
            self.tracker = SiteTracker(Path(self.output_folder), self.current_epoch)
            self.logger.loggers.append(self.tracker)

    def print_plans(self) -> None:
        """nnU-Net's. What it does next is to copy the fingerprint of this site's cases into the results.

        These may leave the site, so it is shown a fingerprint of no single case, until it plots the architecture.
        """
        super().print_plans()
        self._cleanup = ExitStack()
        self._cleanup.callback(setattr, self, "preprocessed_dataset_folder_base", self.preprocessed_dataset_folder_base)
        self.preprocessed_dataset_folder_base = self._cleanup.enter_context(TemporaryDirectory())
        write_json(Path(self.preprocessed_dataset_folder_base) / OWN, without_cases(self.plans_manager.plans), indent=4)

    def plot_network_architecture(self) -> None:
        """nnU-Net's, once the fingerprint is copied."""
        self._cleanup.close()
        super().plot_network_architecture()

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with our state added; it replaces an older one only once it is complete."""
        self.save_for_prediction(filename, {checkpoint.FEDERATION: self.training_state()})

    def save_for_prediction(self, filename: str, additions: dict[str, Any] | None = None) -> None:
        """nnU-Net's checkpoint of the current network.

        It names the base trainer, or :attr:`PREDICTED_AS`.

        Args:
            filename: replaced once the new file is complete.
            additions: further entries.
        """
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        entries = {**(additions or {}), "trainer_name": self.PREDICTED_AS or self.base_trainer.__name__}
        with checkpoint.written_with(entries, Path(filename)) as part:
            super().save_checkpoint(str(part))

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """nnU-Net's checkpoint and our state."""
        with checkpoint.read_whole():
            super().load_checkpoint(filename_or_checkpoint)
        self._resumed = checkpoint.federation_state(Path(filename_or_checkpoint))
        if self._resumed is not None:
            self.load_training_state(self._resumed)

    @property
    def skips_validation(self) -> bool:
        """Whether who started the command wants no validation."""
        return bool(os.environ.get(SKIP_VALIDATION_VARIABLE))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """:meth:`validate`, unless it is to be skipped."""
        if self.skips_validation:
            self.print_to_log_file(f"Validation is skipped, since {SKIP_VALIDATION_VARIABLE} is set.")
            self._stop_tracking()
            return
        with sentences_for_users(), logged_by(self.print_to_log_file):
            self.validate(save_probabilities)
        self._stop_tracking()

    def _stop_tracking(self) -> None:
        if self.tracker is not None:
            self.logger.loggers.remove(self.tracker)
            self.tracker.close()
            self.tracker = None

    def validate(self, save_probabilities: bool) -> None:
        """nnU-Net's validation of :attr:`network`, then the same by lesion size."""
        require_previous_stage(self, self.do_split()[1] if self.is_cascaded else [])
        with predicting_next_stages(self):
            super().perform_actual_validation(save_probabilities)
        evaluate_lesions(self)
