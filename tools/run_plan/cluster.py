"""A cluster on paper: devices, nodes, and the three links that bytes travel over. Decimal units, one direction."""

from pathlib import Path
from typing import Self

import yaml
from pydantic import Field, ValidationError, model_validator

from megatron_dept.common.errors import ConfigError
from megatron_dept.config.schema import Section

DEVICES: dict[str, tuple[float, float, float]] = {
    # Dense bf16 and fp32 TFLOP/s and GB of memory, from the makers' datasheets.
    "B200": (2250.0, 75.0, 180.0),
    "H200": (989.0, 67.0, 141.0),
    "H100": (989.0, 67.0, 80.0),
    "H100 PCIe": (756.0, 51.0, 80.0),
    "H100 NVL": (835.0, 60.0, 94.0),
    "A100": (312.0, 19.5, 80.0),
    "L40S": (362.0, 91.6, 48.0),
    "MI300X": (1307.0, 163.4, 192.0),
    "RTX4090": (165.2, 82.6, 24.0),
}


class Cluster(Section):
    """One silo's nodes, and what joins the silos; every silo is alike.

    Rates are of one direction: a device, a node or a silo sends and receives at once.
    """

    name: str
    gpus_per_node: int = Field(gt=0)
    nodes_per_silo: int = Field(1, gt=0)
    device: str | None = Field(None, description=f"one of {', '.join(DEVICES)}")
    peak_tflops: float | None = Field(None, gt=0, description="in the run's precision; default: the device's")
    memory_gb: float | None = Field(None, gt=0, description="default: the device's")
    achieved: float = Field(gt=0, le=1, description="fraction of the peak that a step's arithmetic reaches")
    node_link: str = Field("NVLink", description="what joins the devices of a node: a name")
    node_gigabytes_per_second: float = Field(gt=0, description="of one device, over node_link")
    infiniband_gbits_per_gpu: float | None = Field(None, gt=0)
    infiniband_gbits_per_node: float | None = Field(None, gt=0, description="instead: of the whole node")
    wan_mbits_per_silo: float | None = Field(None, gt=0, description="between silos; default: InfiniBand there too")
    gradient_overlap: float = Field(0.0, ge=0, le=1, description="fraction of gradient traffic hidden by arithmetic")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.device is not None and self.device not in DEVICES:
            raise ValueError(
                f"device {self.device} is unknown; choose one of {', '.join(DEVICES)}, or give peak_tflops"
            )
        if self.device is None and (self.peak_tflops is None or self.memory_gb is None):
            raise ValueError("there is neither a device nor both peak_tflops and memory_gb; give one or the other")
        several = self.nodes_per_silo > 1 or self.wan_mbits_per_silo is None
        given = [self.infiniband_gbits_per_gpu, self.infiniband_gbits_per_node]
        if all(given) or (several and not any(given)):
            raise ValueError("give one of infiniband_gbits_per_gpu and infiniband_gbits_per_node")
        return self

    @property
    def gpus_per_silo(self) -> int:
        return self.gpus_per_node * self.nodes_per_silo

    @property
    def between_silos(self) -> str:
        """The link between silos."""
        return "InfiniBand" if self.wan_mbits_per_silo is None else "WAN"

    def memory_bytes(self) -> float:
        """Of one device."""
        return 1e9 * (self.memory_gb or DEVICES[self.device or ""][2])

    def flops(self, precision: str) -> float:
        """FLOP/s that one device reaches."""
        peak = self.peak_tflops or DEVICES[self.device or ""][0 if precision == "bf16" else 1]
        return peak * 1e12 * self.achieved

    def rank_bytes_per_second(self, link: str) -> float:
        """What one device sends over a link that all devices of its node (its silo, for WAN) use at once."""
        if link == self.node_link:
            return self.node_gigabytes_per_second * 1e9
        if link == "WAN":
            assert self.wan_mbits_per_silo is not None
            return self.wan_mbits_per_silo * 1e6 / 8 / self.gpus_per_silo
        gbits = self.infiniband_gbits_per_gpu or (self.infiniband_gbits_per_node or 0) / self.gpus_per_node
        return gbits * 1e9 / 8


def load_cluster(file: Path) -> Cluster:
    """Read a cluster's YAML file; `ConfigError` naming the file, the field and the remedy."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of fields, not {type(values).__name__}")
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        told = []
        for item in error.errors():
            where = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                told.append(f"unknown field {where}; known fields: {', '.join(Cluster.model_fields)}")
            else:
                told.append(f"{where}: " * bool(where) + item["msg"].removeprefix("Value error, "))
        raise ConfigError(f"{file}: {'; '.join(told)}") from error
