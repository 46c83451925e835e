"""A site's script in the NVIDIA FLARE benchmark: tensors for the placeholder, and then what comes is sent back."""

from __future__ import annotations

import nvflare.client as flare
from measuring import Settings, random_tensors, stamp


def main() -> None:
    """Until the job is over."""
    settings = Settings.read()
    flare.init()
    site = flare.system_info()["site_name"]
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        if "placeholder" in model.params:
            tensors = random_tensors(settings.shapes, 0)
        else:
            stamp(settings, site)
            tensors = model.params
        flare.send(flare.FLModel(params=tensors, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main()
