"""FedSM's super model on top of nnU-Net's predictor: for each case one model, chosen by the selector. Source: ours."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.methods.fedsm import GLOBAL, check_gamma
from nnunet_fed.methods.selector import header_features
from nnunet_fed.prediction.bundle import (
    BUNDLE,
    FoldBundle,
    load_tensors,
    read_bundle,
    verify_fold,
)
from nnunet_fed.prediction.checkpoint_files import GLOBAL_CHECKPOINT
from nnunet_fed.prediction.routing import Router, RoutingLog

ROUTING = "routing.json"

logger = logging.getLogger(__name__)


class _Model(NamedTuple):
    """What nnU-Net's predictor needs of a model: weights of each fold, and the axes along which it may mirror."""

    parameters: list[dict[str, torch.Tensor]]
    mirroring_axes: tuple[int, ...] | None


class SuperModelPredictor(nnUNetPredictor):
    """nnU-Net's predictor, which predicts each case with the model that the selector chooses for it.

    All ways of nnU-Net to predict cases go through :meth:`predict_logits_from_preprocessed_data`, where the weights of
    the chosen model take the place of the global model's. ``torch.compile`` is not affected: weights are loaded into
    one and the same network.

    Args:
        gamma: threshold; ``None``: the one that the bundle names.
        force: predict every case with this site's model, or with the global one, without asking the selector.
        nnunet: the arguments of ``nnUNetPredictor``.
    """

    router: Router
    """Set by :meth:`initialize_from_trained_model_folder`."""
    list_of_parameters: Any
    allowed_mirroring_axes: Any

    def __init__(self, *, gamma: float | None = None, force: str | None = None, **nnunet: Any):
        self._gamma = None if gamma is None else check_gamma(gamma)
        self._force = force
        super().__init__(**nnunet)
        self._models: dict[str, _Model] = {}
        self._upcoming: deque[str] = deque()
        self._log: RoutingLog | None = None
        self.image_files: dict[str, Sequence[str]] = {}
        """Raw images of the cases, by name; read for a selector with header features only."""

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | None = None,
        checkpoint_name: str = GLOBAL_CHECKPOINT,
    ) -> None:
        """Load the global model as nnU-Net does, the personalized models memory-mapped, and the selectors.

        Args:
            model_training_output_dir: folder with ``plans.json`` and ``fedsm_bundle.json``.
            use_folds: their models are averaged, and so are their selectors' probabilities; ``None``: all folds of the
                bundle.
            checkpoint_name: of the global model.

        Raises:
            FederationError: the bundle or a file of it is missing or damaged, its folds do not belong together, or it
                does not suit this model or what was asked for.
        """
        folder = Path(model_training_output_dir)
        known = read_bundle(folder).folds
        wanted = list(known) if use_folds is None else list(dict.fromkeys(str(fold) for fold in use_folds))
        unknown = [fold for fold in wanted if fold not in known]
        if unknown or not wanted:
            raise ConfigurationError(
                f"{folder / BUNDLE} has no fold {', '.join(unknown)}; choose with -f from {', '.join(known)}."
            )
        folds = {fold: known[fold] for fold in wanted}
        for name in ("plans.json", "dataset.json"):
            if not (folder / name).is_file():
                raise ConfigurationError(f"{folder / name} is missing; copy the model folder again.")
        for fold, entry in folds.items():
            verify_fold(folder, fold, entry)
        self.router = Router(folder, folds, self._gamma, self._force)
        super().initialize_from_trained_model_folder(str(folder), wanted, checkpoint_name)
        self._check_selector(folder)
        self._models = {GLOBAL: _Model(self.list_of_parameters, self.allowed_mirroring_axes)}
        self._models |= {site: self._load(folder, folds, site) for site in self.router.available}

    def predict_folder(
        self,
        source: Path,
        out: Path,
        *,
        previous_stage: Path | None = None,
        save_probabilities: bool = False,
        continue_prediction: bool = False,
        processes_preprocessing: int = 3,
        processes_export: int = 3,
    ) -> Counter[tuple[str, str]]:
        """Predict a folder of images as ``nnUNetv2_predict`` does, and write ``routing.json`` beside the predictions.

        Args:
            source: images, named as in nnU-Net's raw data sets.
            out: where the segmentations go.
            previous_stage: what a cascade's first stage has predicted of the same images; for its second stage only.
            save_probabilities: write these too.
            continue_prediction: leave cases alone that are predicted already.
            processes_preprocessing: for this; if both numbers are 0, all is done in this process.
            processes_export: for resampling and writing segmentations.

        Returns:
            Number of cases in ``routing.json`` by choice and reason.

        Raises:
            ConfigurationError: no images, incomplete ones, no prediction of the previous stage, or a prediction to
                continue that was another.
        """
        processes = (processes_preprocessing, processes_export)
        if min(processes) < 0 or (0 in processes and any(processes)):
            raise ConfigurationError(
                f"-npp {processes_preprocessing} -nps {processes_export}: give numbers from 1 on, or 0 for both to do "
                "without processes."
            )
        cases = self._cases(source)
        before = self._previous_stage(previous_stage, cases)
        out.mkdir(parents=True, exist_ok=True)
        self._log = RoutingLog(out / ROUTING, self.router.settings, continue_prediction)
        if any(processes):
            self.predict_from_files(
                cases, str(out), save_probabilities, not continue_prediction, processes_preprocessing,
                processes_export, before,
            )  # fmt: skip
        else:
            self.predict_from_files_sequential(cases, str(out), save_probabilities, not continue_prediction, before)
        return self._log.counts()

    # ------------------------------------------------------------------------------------------------ nnU-Net's hooks

    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """Logits of the model that is chosen for this case; the next case finds everything as this one did.

        Raises:
            FederationError: the selector cannot see the case.
        """
        case = self._upcoming.popleft() if self._upcoming else "array"
        try:
            taken, probabilities = self.router.choose(data, self._header(case) if self.router.needs_header else None)
        except FederationError as error:
            raise FederationError(f"Case '{case}': {error}") from None
        likeliest = "" if probabilities is None else f", most probable: {max(probabilities.values()):.3f}"
        logger.info("%s: %s (%s%s)", case, taken.choice, taken.reason, likeliest)
        usual = (self.list_of_parameters, self.allowed_mirroring_axes)
        self.list_of_parameters, self.allowed_mirroring_axes = self._models[taken.choice]
        try:
            logits: torch.Tensor = super().predict_logits_from_preprocessed_data(data)
        finally:
            self.list_of_parameters, self.allowed_mirroring_axes = usual
        if self._log is not None:
            self._log.note(case, taken, probabilities)
        return logits

    def predict_from_data_iterator(self, data_iterator: Iterable[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """nnU-Net's, told which case comes next."""
        return super().predict_from_data_iterator(self._announced(data_iterator), *args, **kwargs)

    def _manage_input_and_output_lists(self, *args: Any, **kwargs: Any) -> Any:
        """nnU-Net's; notes the cases, in the order in which one process predicts them."""
        inputs, outputs, previous = super()._manage_input_and_output_lists(*args, **kwargs)
        if outputs is not None:
            names = [Path(path).name for path in outputs]
            self.image_files.update(zip(names, inputs, strict=True))
            self._upcoming = deque(names)
        return inputs, outputs, previous

    def _announced(self, items: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for item in items:
            self._upcoming = deque([] if item["ofile"] is None else [Path(item["ofile"]).name])
            yield item

    # ------------------------------------------------------------------------------------------------------- the files

    def _header(self, case: str) -> torch.Tensor:
        if case not in self.image_files:
            raise FederationError("its raw image is unknown, and the selector's header features come from there.")
        image, properties = self.plans_manager.image_reader_writer_class().read_images(self.image_files[case])
        return header_features(image, properties["spacing"])

    def _load(self, folder: Path, folds: Mapping[str, FoldBundle], site: str) -> _Model:
        """A site's personalized model, compared with the global one."""
        expected = {name: tensor.shape for name, tensor in self.list_of_parameters[0].items()}
        checkpoints = []
        for fold, entry in folds.items():
            path = folder / f"fold_{fold}" / entry.personal_checkpoints[site]
            checkpoint = load_tensors(path)
            if {name: tensor.shape for name, tensor in checkpoint["network_weights"].items()} != expected:
                raise FederationError(f"{path} is of another network than the global model; train the fold anew.")
            checkpoints.append(checkpoint)
        axes = checkpoints[0].get("inference_allowed_mirroring_axes")
        return _Model([checkpoint["network_weights"] for checkpoint in checkpoints], axes)

    def _check_selector(self, folder: Path) -> None:
        """Refuse a selector that is not for images as this model's are."""
        selector = self.router.configuration
        channels = len(self.dataset_json.get("channel_names") or self.dataset_json["modality"])
        patch_size = tuple(self.configuration_manager.patch_size)
        if (selector.channels, selector.patch_size) != (channels, patch_size):
            raise ConfigurationError(
                f"The selector in {folder / BUNDLE} is for images of {selector.channels} channels and patches of "
                f"{selector.patch_size} voxels, but the model's have {channels} channels and {patch_size} voxels. "
                "Train the fold anew."
            )

    def _cases(self, source: Path) -> list[list[str]]:
        """The images of each case in a folder."""
        ending, channels = self.dataset_json["file_ending"], self.router.configuration.channels
        if not source.is_dir():
            raise ConfigurationError(f"-i {source}: there is no such folder.")
        cases: list[list[str]] = create_lists_from_splitted_dataset_folder(str(source), ending, num_processes=1)
        if not cases:
            raise ConfigurationError(
                f"-i {source}: there are no images with names as nnU-Net's, such as case_0000{ending}."
            )
        for files in cases:
            found = len(files)
            if found != channels:  # or one file has several: colours
                found = self._planes(files)
            if found != channels:
                raise ConfigurationError(
                    f"-i {source}: the model needs {channels} channels of each case, but there are {found} of "
                    f"{Path(files[0]).name}."
                )
        return cases

    def _previous_stage(self, folder: Path | None, cases: list[list[str]]) -> str | None:
        """The folder, for nnU-Net, once it has a segmentation of each case."""
        first, option = self.configuration_manager.previous_stage_name, "-prev_stage_predictions"
        if first is None:
            if folder is not None:
                raise ConfigurationError(f"{option}: this model has no previous stage; leave the option out.")
            return None
        if folder is None:
            raise ConfigurationError(
                f"This model goes on from predictions of {first}: predict the same images with that model first, and "
                f"name the folder with {option}."
            )
        ending = self.dataset_json["file_ending"]
        names = [Path(files[0]).name.removesuffix(ending)[: -len("_0000")] + ending for files in cases]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigurationError(f"{option} {folder}: {missing[0]} is missing; predict it with {first} first.")
        return str(folder)

    def _planes(self, files: list[str]) -> int:
        try:
            image, _ = self.plans_manager.image_reader_writer_class().read_images(files)
        except Exception as error:  # the readers raise whatever their libraries do
            raise FederationError(f"{', '.join(files)} cannot be read: {error}. Replace the case.") from error
        return len(image)
