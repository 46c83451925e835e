"""What FedOAP adds to nnU-Net's usual networks, and what of it travels: parameters and bytes, without any memory.

python benchmarks/methods/fedoap_parameters.py --json fedoap_parameters.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from rich.console import Console
from rich.table import Table
from torch import nn

from nnunet_fed.methods.fedoap import Adapter, FedOAPArchitecture, QueryBranch, is_private, wrap_network
from nnunet_fed.methods.tensors import shared_tensors

WIDTHS = {2: (32, 64, 128, 256, 512, 512, 512, 512), 3: (32, 64, 128, 256, 320, 320)}
BLOCKS = (1, 3, 4, 6, 6, 6, 6)
"""Of a residual encoder, as nnU-Net's ResEnc planners set them."""
NETWORKS = {
    "PlainConvUNet 3D, 6 stages": (PlainConvUNet, 3, 6),
    "ResidualEncoderUNet 3D, 6 stages": (ResidualEncoderUNet, 3, 6),
    "PlainConvUNet 2D, 8 stages": (PlainConvUNet, 2, 8),
    "ResidualEncoderUNet 2D, 7 stages": (ResidualEncoderUNet, 2, 7),
}


def build(kind: type[nn.Module], dimensions: int, stages: int) -> nn.Module:
    """nnU-Net's network for one channel, background and tumour."""
    residual = kind is ResidualEncoderUNet
    return kind(
        input_channels=1, n_stages=stages, features_per_stage=WIDTHS[dimensions][:stages],
        conv_op=nn.Conv2d if dimensions == 2 else nn.Conv3d, kernel_sizes=3, strides=[1, *[2] * (stages - 1)],
        num_classes=2, n_conv_per_stage_decoder=1 if residual else 2, conv_bias=True,
        norm_op=nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **({"n_blocks_per_stage": BLOCKS[:stages]} if residual else {"n_conv_per_stage": 2}),
    )  # fmt: skip


def measure(name: str, architecture: FedOAPArchitecture) -> dict[str, Any]:
    """Parameters of one network before and after wrapping, and what of it is uploaded in a round."""
    with torch.device("meta"):
        network = build(*NETWORKS[name])
        base = count(network.parameters())
        wrapped = shared_tensors(wrap_network(network, architecture))
    shared = {name: tensor for name, tensor in wrapped.items() if not is_private(name)}
    return {
        "network": name, "base": base, "wrapped": count(wrapped.values()), "shared": count(shared.values()),
        "private": count(wrapped.values()) - count(shared.values()),
        "upload_bytes": sum(tensor.nbytes for tensor in shared.values()),
    }  # fmt: skip


def count(tensors: Iterable[torch.Tensor]) -> int:
    """Numbers in the tensors."""
    return sum(tensor.numel() for tensor in tensors)


def main() -> None:
    """Measure the four networks and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--query-branch", choices=get_args(QueryBranch), default="copy")
    parser.add_argument("--adapter", choices=get_args(Adapter), default="res3")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    architecture = FedOAPArchitecture(query_branch=arguments.query_branch, adapter=arguments.adapter)
    rows = [measure(name, architecture) for name in NETWORKS]
    title = f"Millions of parameters, query branch '{architecture.query_branch}', adapter '{architecture.adapter}'"
    table = Table(title=title)
    for column in ("network", "base", "wrapped", "added", "shared", "private", "private share", "upload a round, MB"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        base, wrapped, shared, private = (row[key] / 1e6 for key in ("base", "wrapped", "shared", "private"))
        table.add_row(
            row["network"], f"{base:.2f}", f"{wrapped:.2f}", f"{wrapped / base - 1:+.1%}", f"{shared:.2f}",
            f"{private:.2f}", f"{private / wrapped:.1%}", f"{row['upload_bytes'] / 1e6:.1f}",
        )  # fmt: skip
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
