"""This site's part of the fingerprint, by nnU-Net's own analysis of each case."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from rich.console import Console
from rich.progress import Progress

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.errors import FederationError
from nnunet_fed.evaluation.lesions import lesion_volumes
from nnunet_fed.inspection.reading import choose_reader, reader_class


def extract(dataset_id: int, total_cases: int, processes: int) -> LocalFingerprint:
    """Analyse all training cases of a data set, always afresh.

    Source: nnunetv2's ``DatasetFingerprintExtractor``, which looks the cases up and analyses each; a foreground sample
    depends on the case and the sample's size only, so it is the one that nnU-Net draws from all sites' cases together.

    Args:
        dataset_id: nnU-Net's number of the data set.
        total_cases: number of training cases whose intensities are pooled.
        processes: number of worker processes.

    Returns:
        Geometry of each case, and float32 intensities pooled over the cases; they are float64 where a case has no
        foreground, as in nnU-Net. Besides the volumes of all lesions, which nnU-Net does not measure.

    Raises:
        FederationError: a case cannot be analysed, has values that are not finite, or its worker died.
    """
    extractor = DatasetFingerprintExtractor(dataset_id, processes)
    cases: dict[str, dict[str, Any]] = extractor.dataset
    samples = int(extractor.num_foreground_voxels_for_intensitystats // total_cases)
    reader = reader_class(choose_reader(extractor.dataset_json, [files["images"][0] for files in cases.values()]))
    results: dict[str, tuple[Any, ...]] = {}
    waiting = list(reversed(cases))
    running: dict[Future[Any], str] = {}
    # spawn: a forked copy of a process with threads, an open channel among them, may hang
    context = multiprocessing.get_context("spawn")
    # a console of its own: sites that are threads of one process would share the global one
    with ProcessPoolExecutor(processes, context) as pool, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"Extracting fingerprint of {extractor.dataset_name}", total=len(cases))
        try:
            while waiting or running:
                # no more cases than workers: if a worker dies, these are the suspects
                while waiting and len(running) < processes:
                    case = waiting.pop()
                    labels = extractor.dataset_json["labels"]
                    job = pool.submit(_analyse, extractor.analyze_case, cases[case], reader, samples, labels)
                    running[job] = case
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for job in done:
                    case = running[job]
                    results[case] = _result(job, case, cases[case])
                    del running[job]
                    progress.advance(bar)
        except BrokenProcessPool:
            suspects = "; ".join(f"case {case} ({_names(cases[case])})" for case in running.values())
            raise FederationError(
                f"A worker died while it analysed {suspects or 'nothing'}, most likely for want of memory; "
                "use fewer processes."
            ) from None
    ordered = [results[case] for case in cases]
    return LocalFingerprint(
        spacings=[result[1] for result in ordered],
        shapes_after_crop=[result[0] for result in ordered],
        relative_sizes=[float(result[4]) for result in ordered],
        intensities=[np.concatenate(channel) for channel in zip(*(result[2] for result in ordered), strict=True)],
        lesion_volumes={name: [volume for result in ordered for volume in result[-1][name]] for name in ordered[0][-1]},
    )


def _analyse(
    analyze_case: Callable[..., tuple[Any, ...]],
    files: dict[str, Any],
    reader: Any,
    samples: int,
    labels: Mapping[str, Any],
) -> tuple[Any, ...]:
    """What nnU-Net says of a case, and the volumes of its lesions; runs in a worker."""
    read: list[Any] = []

    class Keeping(reader):  # type: ignore[misc]
        """Keeps the labels, which are read once; nnU-Net then marks what lies outside as -1, which is no lesion."""

        def read_seg(self, seg_fname: str) -> Any:
            read.append(super().read_seg(seg_fname))
            return read[-1]

    result = analyze_case(files["images"], files["label"], Keeping, samples)
    segmentation, _ = read[-1] if read else reader().read_seg(files["label"])
    # the spacing of the images: a label file without a sidecar (TIFF) has none
    return (*result, lesion_volumes(segmentation[0], result[1], labels))


def _result(job: Future[Any], case: str, files: dict[str, Any]) -> tuple[Any, ...]:
    """What nnU-Net says of a case, or a :class:`FederationError` that names the case."""
    try:
        result: tuple[Any, ...] = job.result()
    except BrokenProcessPool:
        raise
    except Exception as error:  # whatever the reader or nnU-Net raise
        if "NaN" in str(error):  # nnU-Net's assertion
            raise _not_finite(case, files) from None
        raise FederationError(
            f"Case {case} ({_names(files)}) cannot be analysed: {type(error).__name__}: {error}. Correct or remove the "
            "case; nnUNetv2_extract_fingerprint --verify_dataset_integrity tells more."
        ) from error
    if not all(np.isfinite(channel).all() for channel in result[2]):
        raise _not_finite(case, files)
    return result


def _not_finite(case: str, files: dict[str, Any]) -> FederationError:
    return FederationError(
        f"Case {case} ({_names(files)}) holds NaN or infinite values; "
        "replace them by numbers that make sense for these images."
    )


def _names(files: dict[str, Any]) -> str:
    return ", ".join([*files["images"], files["label"]])
