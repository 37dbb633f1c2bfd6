"""Published specifications of accelerators, by JAX's `device_kind`.

Peaks are for dense bfloat16 products with float32 accumulation: half of the figure for 2:4 sparse
matrices in NVIDIA's data sheets. For devices that are not listed, CPUs included, every function
returns None, never an estimate.

Sources. TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; the links of v4 after Jouppi et
al., "TPU v4" (ISCA 2023), six of 50 GB/s in each direction. NVIDIA: the data sheets of A100
(nvidia-a100-datasheet), H100, H200, GH200, L4, L40S and HGX B200.

Data-centre network. TPU: the same pages; v5p 50 Gbit/s per chip and TPU7x and v6e 100 Gbit/s ("Data
center network (DCN) bandwidth per chip", page tpu7x), v5e 6.4 Tbit/s for a pod of 256 chips, v4
unpublished. GPUs of a DGX with eight: one network card each, 200 Gbit/s for A100 (DGX A100 user
guide), 400 Gbit/s for H100, H200 and B200 (DGX BasePOD reference architecture).
"""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts devices.

    peak: FLOP/s, dense bfloat16. memory: bytes. bandwidth: memory bandwidth, bytes/s.
    interconnect: bytes/s to other devices of its kind, both directions summed; None without a
    dedicated link (PCIe only). data_centre: bytes/s in each direction to other slices or nodes;
    None if unpublished.
    """

    peak: float
    memory: int
    bandwidth: float
    interconnect: float | None
    data_centre: float | None = None


def _chip(
    tflops: float,
    gib: float,
    gb_per_s: float,
    link_gb_per_s: float | None,
    gbit_per_s: float | None = None,
) -> Chip:
    link = None if link_gb_per_s is None else link_gb_per_s * 1e9
    outside = None if gbit_per_s is None else gbit_per_s * 1e9 / 8
    return Chip(tflops * 1e12, int(gib * _GIB), gb_per_s * 1e9, link, outside)


_V5E = _chip(197.0, 16.0, 819.0, 400.0, 25.0)
_V5P = _chip(459.0, 95.0, 2765.0, 1200.0, 50.0)
_V6E = _chip(918.0, 32.0, 1638.0, 800.0, 100.0)

CHIPS: dict[str, Chip] = {
    "TPU v4": _chip(275.0, 32.0, 1200.0, 600.0),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    # JAX treats the two halves of this chip as two devices; each has half of the published
    # 2307 TFLOP/s, 192 GiB, 7380 GB/s, 1200 GB/s and 100 Gbit/s.
    "TPU7x": _chip(1153.5, 96.0, 3690.0, 600.0, 50.0),
    "NVIDIA A100-SXM4-40GB": _chip(312.0, 40.0, 1555.0, 600.0, 200.0),
    "NVIDIA A100-SXM4-80GB": _chip(312.0, 80.0, 2039.0, 600.0, 200.0),
    "NVIDIA A100-PCIE-40GB": _chip(312.0, 40.0, 1555.0, None),
    "NVIDIA A100 80GB PCIe": _chip(312.0, 80.0, 1935.0, None),
    "NVIDIA H100 80GB HBM3": _chip(989.0, 80.0, 3350.0, 900.0, 400.0),
    "NVIDIA H100 PCIe": _chip(756.0, 80.0, 2000.0, None),
    "NVIDIA H100 NVL": _chip(835.0, 94.0, 3900.0, 600.0),
    "NVIDIA H200": _chip(989.0, 141.0, 4800.0, 900.0, 400.0),
    "NVIDIA GH200 480GB": _chip(989.0, 96.0, 4000.0, 900.0),
    "NVIDIA B200": _chip(2250.0, 180.0, 8000.0, 1800.0, 400.0),
    "NVIDIA L4": _chip(121.0, 24.0, 300.0, None),
    "NVIDIA L40S": _chip(362.0, 48.0, 864.0, None),
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of `jax.Device.device_kind`; None if it is not listed."""
    chip = CHIPS.get(device_kind)
    return None if chip is None else chip.peak


def mfu(
    flops_per_token: float, tokens_per_second: float, device_kind: str, devices: int = 1
) -> float | None:
    """`flops_per_token * tokens_per_second` as a fraction of the devices' peak, 0 .. 1.

    With the model FLOPs of the tokens actually routed this is the model FLOPs utilisation (MFU);
    with hardware FLOPs, the hardware FLOPs utilisation. None if the device is not listed.
    tokens_per_second: of all `devices` together.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * devices)
