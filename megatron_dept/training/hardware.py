"""The device's peak rate, which MFU is measured against."""

import time

import torch

# Dense bf16 TFLOP/s by a part of the device's name, from the makers' datasheets.
DATASHEET_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "MI300X": 1307.0}
PROBE_SIZE = 1024


def peak_flops(device: torch.device, configured_tflops: float | None) -> float:
    """FLOP/s of one rank's device: as configured, else the datasheet's, else a matrix product timed here and now."""
    if configured_tflops is not None:
        return configured_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, tflops in DATASHEET_TFLOPS.items():
            if part in name:
                return tflops * 1e12
    return _measured(device)


def _measured(device: torch.device) -> float:
    left, right = torch.ones(2, PROBE_SIZE, PROBE_SIZE, device=device)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        product = left @ right
        float(product[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * PROBE_SIZE**3 / best
