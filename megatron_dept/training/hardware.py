"""The device's peak rate, which MFU is measured against."""

import time

import torch

# Dense bf16 TFLOP/s by a part of the device's name, from the makers' datasheets; the first that fits counts.
DATASHEET_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
}
PROBE_SIZE = 1024
GPU_PROBE_SIZE = 8192


def peak_flops(device: torch.device, configured_tflops: float | None) -> float:
    """FLOP/s of one rank's device: as configured, else the datasheet's, else a matrix product timed here and now."""
    if configured_tflops is not None:
        return configured_tflops * 1e12
    return datasheet_flops(device) or _measured(device)


def datasheet_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its maker; None of what no datasheet here names."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in DATASHEET_TFLOPS.items() if part in name), None)


def _measured(device: torch.device) -> float:
    """A product of random numbers: on GPUs in bf16, whose rate the datasheets give, and large enough to fill one."""
    on_gpu = device.type == "cuda"
    size, dtype = (GPU_PROBE_SIZE, torch.bfloat16) if on_gpu else (PROBE_SIZE, torch.float32)
    left, right = torch.randn(2, size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    best = float("inf")
    for _ in range(5):
        if on_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        product = left @ right
        float(product[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
