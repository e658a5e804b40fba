"""eval/bench/machine.py: a record names family and model of the processor, and the width of its floating-point units."""

from bench import machine as found
from bench.machine import describe_machine, machine, processor, vector_unit_bits

import pytest

ZEN4 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu sse hypervisor avx avx2 fma avx512f avx512_bf16

processor\t: 1
model\t\t: 99
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"


def test_a_processor_is_read_from_cpuinfo(tmp_path, monkeypatch):
    monkeypatch.setattr(found, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(ZEN4)
    cpu = processor()
    assert (cpu["name"], cpu["vendor"], cpu["family"], cpu["model"]) == ("AMD EPYC", "AuthenticAMD", 25, 17)
    assert cpu["flags"] == ["avx", "avx2", "fma", "avx512f", "avx512_bf16"]
    assert cpu["virtual_machine"] and cpu["vector_unit_bits"] == 256
    record = machine("cpu") | {"load_average": 1.5, "load_average_after": 2.0, "threads": 1}
    record["processor"]["cores"] = 2
    assert describe_machine(record) == "AMD EPYC (family 25, model 17), 1 of 2 cores, load average 1.5 to 2.0"


def test_what_the_system_does_not_tell_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(found, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(ARM)
    cpu = processor()
    assert cpu["flags"] == ["asimd", "sve", "bf16"] and cpu["vendor"] == "0x41" and "family" not in cpu
    (tmp_path / "cpuinfo").unlink()
    assert processor()["flags"] == [] and describe_machine(machine("cpu"))


@pytest.mark.parametrize(
    ("vendor", "family", "model", "flags", "bits"),
    [
        ("AuthenticAMD", 25, 17, ["avx2", "avx512f"], 256),
        ("AuthenticAMD", 25, 1, ["avx2"], 256),
        ("AuthenticAMD", 26, 2, ["avx2", "avx512f"], 512),
        ("AuthenticAMD", 26, 0x24, ["avx2", "avx512f"], None),
        ("GenuineIntel", 6, 143, ["avx2", "avx512f"], 512),
        (None, None, None, [], None),
    ],
)
def test_the_width_of_the_units_follows_from_family_and_model(vendor, family, model, flags, bits):
    assert vector_unit_bits(vendor, family, model, flags) == bits
