"""Devices: what is listed, tried, chosen and given up, on a machine without a GPU.

PoCL runs OpenCL on the processor and shows it as two devices, so routing and fallback are the real
ones. Stand-ins for broken drivers and for NVIDIA's are libraries compiled here and loaded as such.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import sensequant

POCL, POCL_PACKAGE = Path("/etc/OpenCL/vendors/pocl.icd"), "pocl-opencl-icd"
NO_OPENCL = {"OCL_ICD_VENDORS": "/nonexistent"}
PRELUDE = """
import json, os
from types import SimpleNamespace
import numpy as np
import sensequant.learn.devices as d

def spec(**own):
    base = dict(device_type="auto", gpu_platform_id=-1, gpu_device_id=-1, gpu_use_dp=False,
                gpu_min_rows=1_000_000)
    return SimpleNamespace(**base | own)

x = np.random.default_rng(0).normal(size=(400, 4))
y = x[:, 0] + 0.3 * x[:, 1] > 0

def train(device):
    import lightgbm as lgb
    own = dict(objective="binary", num_leaves=5, num_threads=1, verbosity=1)
    own |= d.lightgbm_parameters(device)
    return lgb.train(own, lgb.Dataset(x, y, params=own), 5).predict(x)
"""


def told(code: str, environment: dict[str, str], limit_s: float = 300) -> tuple[dict, str]:
    """What `code` leaves in `answer`, in a process with that environment, and all it printed."""
    program = PRELUDE + textwrap.dedent(code) + "\nprint('ANSWER', json.dumps(answer))"
    root = str(Path(sensequant.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(lines[-1].removeprefix("ANSWER ")), done.stdout


def install_pocl() -> str:
    """Install the driver when this may be done; why not, empty when it is there now."""
    if POCL.exists():
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "only root with apt-get could install it"
    try:
        for words in (["update"], ["install", "-y", "--no-install-recommends", POCL_PACKAGE]):
            subprocess.run(["apt-get", *words], timeout=240, check=True, capture_output=True)
    except (subprocess.SubprocessError, OSError) as error:
        return f"apt-get could not install it: {error}"
    return "" if POCL.exists() else f"{POCL} did not appear"


@pytest.fixture(scope="session")
def pocl(tmp_path_factory):
    """Two OpenCL devices and no other driver."""
    if why := install_pocl():
        pytest.skip(f"{POCL_PACKAGE} is missing: {why}")
    folder = tmp_path_factory.mktemp("pocl")
    shutil.copy(POCL, folder)
    return {"POCL_DEVICES": "pthread basic", "OCL_ICD_VENDORS": str(folder)}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A function that makes a shared library of C text."""
    if not shutil.which("gcc"):
        pytest.skip("a stand-in for a driver needs gcc, which is missing")

    def make(name: str, source: str) -> Path:
        folder = tmp_path_factory.mktemp("driver")
        (folder / "driver.c").write_text(source)
        library = folder / name
        words = ["gcc", "-shared", "-fPIC", "-o", str(library), str(folder / "driver.c")]
        subprocess.run(words, check=True, capture_output=True)
        return library

    return make


def vendor(library: Path) -> dict[str, str]:
    """The environment in which that library is the only OpenCL driver."""
    (library.parent / "driver.icd").write_text(f"{library}\n")
    return {"OCL_ICD_VENDORS": str(library.parent)}


def test_no_driver_is_no_error():
    code = """
    held = d.list_devices()
    choice = d.choose_device(2_000_000, spec())
    answer = dict(names=[x.name for x in held], slots=d.gpu_slots(spec()), why=choice.why,
                  device=choice.device.name, warning=choice.warning)
    """
    answer, _ = told(code, NO_OPENCL)
    if answer["names"] != ["cpu"]:
        pytest.skip("this machine has an NVIDIA driver")
    assert (answer["slots"], answer["device"], answer["warning"]) == ([], "cpu", None)
    assert answer["why"] == "2,000,000 rows reach gpu_min_rows, but no GPU is visible"


def test_a_gpu_asked_for_and_missing_is_told_once():
    code = """
    first, second = (d.choose_device(123, spec(device_type="gpu")) for _ in range(2))
    answer = [first.device.name, first.warning, second.device.name, second.warning, second.why]
    """
    (device, warning, again, silence, why), _ = told(code, NO_OPENCL)
    assert (device, again, silence) == ("cpu", "cpu", None)
    assert warning == f"trained on the processor, because {why}"
    assert why == "device_type is gpu and no such device is visible"


def test_a_driver_that_kills_its_caller(compiled):
    source = "#include <stdlib.h>\n__attribute__((constructor)) static void f(void) { abort(); }"
    code = """
    (gpu,) = [x for x in d.list_devices() if x.kind == "gpu"]
    choice = d.choose_device(123, spec(device_type="gpu"))
    answer = [gpu.usable, gpu.why_not, choice.device.name, choice.warning]
    """
    (usable, why, device, warning), _ = told(code, vendor(compiled("libkills.so", source)))
    assert (usable, why) == (False, "cannot be listed: its process was ended by SIGABRT")
    assert device == "cpu" and why in warning


def test_a_driver_that_hangs(compiled):
    source = "#include <unistd.h>\n__attribute__((constructor)) static void f(void) { sleep(60); }"
    code = """
    d._LIST_S = 2.0
    answer = [x.why_not for x in d.list_devices() if x.kind == "gpu"]
    """
    begun = time.monotonic()
    answer, _ = told(code, vendor(compiled("libhangs.so", source)))
    assert answer == ["cannot be listed: no answer within 2 s"]
    assert time.monotonic() - begun < 30


@pytest.mark.slow
def test_two_devices_are_listed_and_an_unknown_one_is_refused(pocl):
    code = """
    from sensequant.core.errors import SettingsError
    held = [x for x in d.list_devices(probe=False) if x.kind == "gpu"]
    refused = []
    for own in ({"gpu_device_id": 2}, {"gpu_platform_id": 3, "gpu_device_id": 0}):
        try:
            d.choose_device(123, spec(device_type="gpu", **own))
        except SettingsError as error:
            refused.append(str(error))
    answer = dict(names=[x.name for x in held], labels=[x.label for x in held], refused=refused,
                  memory=[x.memory_mb for x in held], fast=[x.accelerator for x in held],
                  auto=d.gpu_slots(spec()), why=d.choose_device(2_000_000, spec()).why)
    """
    answer, _ = told(code, pocl)
    assert answer["names"] == ["gpu:0:0", "gpu:0:1"]
    assert sorted(label.split("-")[0] for label in answer["labels"]) == ["basic", "pthread"]
    assert min(answer["memory"]) > 0
    assert answer["fast"] == [False, False]  # a processor under OpenCL is no accelerator
    assert answer["auto"] == [] and "no GPU is visible" in answer["why"]
    assert len(answer["refused"]) == 2
    assert all(text.endswith("There are: gpu:0:0, gpu:0:1") for text in answer["refused"])


@pytest.mark.slow
def test_each_slot_trains_on_its_own_device_and_as_the_processor_does(pocl):
    code = """
    forced = spec(device_type="gpu")
    slots = d.gpu_slots(forced)
    chosen = [d.choose_device(123, forced, assigned=name) for name in slots]
    done = []
    for choice in chosen:
        print("SLOT", choice.device.name, choice.device.label, flush=True)
        done.append(d.train_on(choice, train))
    cpu = train(d.processor())
    answer = dict(slots=slots, why=chosen[0].why, used=[x.choice.device.name for x in done],
                  warnings=[x.choice.warning for x in done],
                  apart=[float(abs(x.value - cpu).max()) for x in done],
                  spread=float(np.ptp(cpu)))
    """
    answer, printed = told(code, pocl)
    assert answer["slots"] == answer["used"] == ["gpu:0:0", "gpu:0:1"]
    assert answer["warnings"] == [None, None]
    assert answer["why"] == "device_type is gpu, and it is the worker's device"
    assert max(answer["apart"]) < 1e-6 < answer["spread"]
    for part in printed.split("SLOT gpu:")[1:]:
        ids, label = part.splitlines()[0].split(" ", 1)
        platform, device = ids.split(":")
        assert f"Using requested OpenCL platform {platform} device {device}" in part
        assert f"Using GPU Device: {label}" in part  # the one that was listed under this name


@pytest.mark.slow
def test_a_device_that_dies_is_replaced_once_and_left_alone(pocl):
    code = """
    forced, tries = spec(device_type="gpu"), []
    (first, *_) = [x for x in d.list_devices(probe=False) if x.kind == "gpu"]
    chosen = d.choose_device(123, forced, assigned=first.name)
    os.environ["POCL_DEVICES"] = "nothing"  # the driver goes away between listing and training

    def counted(device):
        tries.append(device.name)
        return train(device)

    done = d.train_on(chosen, counted)
    later = d.choose_device(123, forced, assigned=first.name)
    again = d.train_on(later, counted)
    answer = dict(tries=tries, used=done.choice.device.name, warning=done.choice.warning,
                  same=bool((done.value == again.value).all()), why=later.why,
                  silent=later.warning, listed=[x.why_not for x in d.list_devices(False)])
    """
    answer, _ = told(code, pocl)
    assert answer["tries"] == ["gpu:0:0", "cpu", "cpu"]
    assert answer["used"] == "cpu" and answer["same"]
    reason = "gpu:0:0 has failed: No OpenCL device found"
    assert answer["warning"] == f"trained on the processor, because {reason}"
    assert (answer["why"], answer["silent"]) == (reason, None)
    assert answer["listed"][1] == "No OpenCL device found"


@pytest.mark.slow
def test_a_device_that_is_listed_and_cannot_train_is_not_used(pocl):
    code = """
    held = d.list_devices(probe=False)
    os.environ["POCL_DEVICES"] = "nothing"
    forced = spec(device_type="gpu")
    choice = d.choose_device(123, forced)
    answer = [d.gpu_slots(forced), choice.device.name, choice.warning]
    """
    (slots, device, warning), _ = told(code, pocl)
    assert (slots, device) == ([], "cpu")
    assert "gpu:0:0: " in warning and "gpu:0:1: " in warning


@pytest.mark.slow
def test_the_bench_times_both(pocl):
    code = """
    held = [x for x in d.list_devices() if x.name in ("cpu", "gpu:0:0")]
    table = d.bench_devices([(300, 4)], trees=3, limit_s=240, devices=held)
    answer = dict(rows=table.to_dict("records"), advice=d.bench_advice(table))
    """
    answer, _ = told(code, pocl)
    assert [r["device"] for r in answer["rows"]] == ["cpu", "gpu:0:0"]
    assert all(r["wall (s)"] > 0 and r["note"] == "" for r in answer["rows"])
    assert "300 rows" in answer["advice"]


NVML = r"""
#include <stdio.h>
#include <string.h>
typedef struct { char old[16]; unsigned domain, bus, device, id, sub; char bus_id[32]; } pci_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } load_t;
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)(long)(i + 1); return 0; }
int nvmlDeviceGetPciInfo_v3(void *h, pci_t *p) {
    memset(p, 0, sizeof *p); p->bus = 0x10 * (long)h + 0xa; return 0; }
int nvmlDeviceGetUUID(void *h, char *s, unsigned n) { sprintf(s, "GPU-%ldabc", (long)h); return 0; }
int nvmlDeviceGetName(void *h, char *s, unsigned n) { strcpy(s, "NVIDIA RTX A6000"); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, memory_t *m) {
    m->total = 48ULL << 30; m->used = 1ULL << 30; m->free = 47ULL << 30; return 0; }
int nvmlSystemGetDriverVersion(char *s, unsigned n) { strcpy(s, "550.54.15"); return 0; }
int nvmlDeviceGetUtilizationRates(void *h, load_t *u) {
    u->gpu = (long)h == 1 ? 0 : 35; u->memory = 1; return 0; }
"""


@pytest.fixture(scope="session")
def nvidia(compiled):
    """A driver with two GPUs, the first of which does nothing."""
    library = compiled("libnvidia-ml.so.1", NVML)
    return {"LD_LIBRARY_PATH": str(library.parent), **NO_OPENCL}


def test_gpus_without_a_build_for_them_say_so(nvidia):
    code = """
    held = d.list_devices()
    choice = d.choose_device(2_000_000, spec())
    answer = dict(held=[[x.name, x.label, x.memory_mb, x.driver, x.pci] for x in held[1:]],
                  why=[x.why_not for x in held[1:]], device=choice.device.name,
                  warning=choice.warning)
    """
    answer, _ = told(code, nvidia)
    same = ["NVIDIA RTX A6000", 48 << 10, "550.54.15"]
    assert answer["held"] == [["cuda:0", *same, "0000:1a:00"], ["cuda:1", *same, "0000:2a:00"]]
    assert answer["why"] == ["CUDA Tree Learner was not enabled in this build."] * 2
    assert answer["device"] == "cpu" and "cuda:0: CUDA Tree Learner" in answer["warning"]
    hidden, _ = told("answer = [x.pci for x in d._cuda()]", nvidia | {"CUDA_VISIBLE_DEVICES": "1"})
    assert hidden == ["0000:2a:00"]


def test_the_idle_gpu_is_named(nvidia, tmp_path):
    code = f"""
    from pathlib import Path
    import time
    from sensequant.core.events import EventLog, read_events
    from sensequant.ops.usage import sampled, usage_chart, usage_summary, usage_table
    log = EventLog(Path({str(tmp_path)!r}) / "events.jsonl", "live_candidate_20240101_000000")
    with sampled(log, every_s=0.05, slots=("cuda:0", "cuda:1")) as sampling:
        time.sleep(0.6)
    events, _ = read_events(log.path)
    means = usage_summary(usage_table(events))["mean"]
    answer = dict(title=usage_chart(events).axes[0].get_title(loc="left"), error=sampling.error,
                  last=events[-1].metrics, means=means.to_dict())
    """
    answer, _ = told(code, nvidia)
    assert (answer["title"], answer["error"]) == ("GPU 0 stood idle", None)
    assert (answer["last"]["gpu0_device"], answer["last"]["gpu1_device"]) == ("cuda:0", "cuda:1")
    assert answer["means"]["GPU 1 (%)"] == 35
    assert answer["last"]["gpu1_memory_mb"] == 1024


def test_sampling_sees_the_workers_and_costs_little(tmp_path):
    code = f"""
    from pathlib import Path
    import subprocess, sys, time
    from sensequant.core.events import EventLog, read_events
    from sensequant.ops.usage import sampled, usage_table
    log = EventLog(Path({str(tmp_path)!r}) / "events.jsonl", "live_candidate_20240101_000000")
    busy = "import time\\nt = time.process_time()\\nwhile time.process_time() - t < 1.5: pass"
    with sampled(log, every_s=0.25):
        subprocess.run([sys.executable, "-c", busy])
    table = usage_table(read_events(log.path)[0])
    seconds = table.index.to_series().diff().dt.total_seconds().fillna(0.25)
    own = float((table["own_pct"] * seconds).sum() / 100 * table["cores"].iloc[0])
    with sampled(log, every_s=0.05) as sampling:
        begun = time.process_time()
        time.sleep(2)
    answer = dict(own=own, each=(time.process_time() - begun) / sampling.taken)
    """
    answer, _ = told(code, NO_OPENCL)
    assert 1.3 < answer["own"] < 2.6  # the worker's 1.5 s, its start, and the sampling
    assert answer["each"] < 0.02  # s a sample; at one in 2 s, 1 % of one core at the very most
    print(answer)  # seconds of a worker seen, seconds a sample costs
