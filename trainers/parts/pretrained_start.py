"""A training that starts from pretrained weights: which file it takes, and when. Source: ours."""

from __future__ import annotations

from pathlib import Path

from nnunetv2.run import run_training

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.trainers.parts.one_process import OneProcessTrainer
from nnunet_fed.trainers.parts.pretrained_weights import PretrainedWeights, read_weights, take_weights
from nnunet_fed.trainers.parts.sentences import sentences_for_users
from nnunet_fed.trainers.parts.training_record import noted_in

OPTION = "-pretrained_weights FILE"
HOW_TO_COMPARE = "'nnunet_fed digest FILE' prints a file's digest."

_load_as_nnunet = run_training.maybe_load_checkpoint


class PretrainedTrainer(OneProcessTrainer):
    """Takes the weights that ``-pretrained_weights`` names before a method makes anything of the network.

    nnU-Net's command would load them once the trainer is initialized: then methods have copied the network already.
    """

    pretrained: str | None = None
    """Digest of the weights from which the training starts; ``None``: its network is drawn from the seed."""
    _weights: PretrainedWeights | None = None
    """Until nnU-Net's start is over, in which the trainer may be initialized again, for more rounds."""

    def configure_study(self) -> None:
        """From now on nnU-Net's command hands its file to a federated trainer."""
        super().configure_study()
        run_training.maybe_load_checkpoint = _load

    def begin_with(self, path: Path) -> None:
        """Let the training start from a checkpoint's weights; one that goes on from its own stays as it is.

        Raises:
            ConfigurationError: the file cannot be read, is not the study's, or is of another network.
        """
        if self._resumed is not None:
            self.print_to_log_file(f"The training goes on from its checkpoint: {path} is not loaded again.")
            return
        weights = read_weights(path)
        self.check_pretrained(weights.digest)
        self.pretrained, self._weights = weights.digest, weights
        self.was_initialized = False
        self.initialize()

    @property
    def named_weights(self) -> str | None:
        """Digest of the weights from which the study lets this training start; ``None``: it says nothing of it.

        It speaks of its own configuration: 2D, or the first stage of a cascade, is another network.
        """
        return self.study.pretrained if self.configuration_name == self.study.configuration else None

    def check_pretrained(self, given: str | None) -> None:
        """See that the weights from which a training is to start are the study's.

        Args:
            given: their digest; ``None``: the command names no file.

        Raises:
            ConfigurationError: they are not.
        """
        study, wanted = self.study.name, self.named_weights
        if wanted is not None and given is None:
            raise ConfigurationError(
                f"The study '{study}' starts from the pretrained weights with the digest {wanted}, and this command "
                f"names none: add {OPTION}. {HOW_TO_COMPARE}"
            )
        if wanted is not None and given != wanted:
            raise ConfigurationError(
                f"The study '{study}' starts from the pretrained weights with the digest {wanted}, and those that this "
                f"command names have {given}: name the study's file. {HOW_TO_COMPARE}"
            )

    def may_begin_anew(self) -> tuple[str, ...]:
        """Beginnings of the names of modules that pretrained weights need not have."""
        return ()

    def initialize(self) -> None:
        """The network, with the pretrained weights until the training has started: a site that starts anew later
        takes the newest model."""
        super().initialize()
        weights = self._weights
        if weights is not None:
            anew = take_weights(self.bare(self.network), weights, self.may_begin_anew())
            self.print_to_log_file(
                f"Pretrained weights {weights.digest} from {weights.path}. As they are built begin: "
                f"{', '.join(('the segmentation heads', *anew))}"
            )

    def on_train_start(self) -> None:
        """See that a training that starts now starts from what it should; then nnU-Net's start."""
        if self._resumed is None:
            self.check_pretrained(self.pretrained)
            before = noted_in(Path(self.output_folder), "pretrained") if self.logger.resume else None
            if before is not None and self.pretrained is None:
                raise ConfigurationError(
                    f"This training was to start from the pretrained weights with the digest {before}, and has no "
                    f"checkpoint yet from which it could go on: add {OPTION} to this command. {HOW_TO_COMPARE}"
                )
        super().on_train_start()
        self._weights = None


def _load(
    nnunet_trainer: object, continue_training: bool, validation_only: bool, pretrained_weights_file: str | None = None
) -> None:
    """nnU-Net's function, but that a federated trainer takes the file itself.

    With ``--c`` too, which nnU-Net refuses: a training that was stopped before its first checkpoint needs it again.
    """
    if not isinstance(nnunet_trainer, PretrainedTrainer):
        _load_as_nnunet(nnunet_trainer, continue_training, validation_only, pretrained_weights_file)
        return
    _load_as_nnunet(nnunet_trainer, continue_training, validation_only)
    if pretrained_weights_file is not None and not validation_only:
        with sentences_for_users():
            nnunet_trainer.begin_with(Path(pretrained_weights_file))
