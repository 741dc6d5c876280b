"""Which CUDA build of torch, which Transformer Engine and which DALI belong to a driver and its GPUs. Decides only.

Sources of the table: NVIDIA's "CUDA Compatibility", minor version compatibility (CUDA 13 needs a driver of at least
580, CUDA 12 of at least 525); PyTorch's RELEASE.md, CUDA support matrix of 2.14 (12.6, 13.0 and 13.2, with their
architectures); pytorch issue 190385 (2.15 drops CUDA 12.6).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from launch.nvidia_driver import shown
from megatron_qwen.errors import UserError

# The version of the figures in docs/performance.md.
TRANSFORMER_ENGINE = "2.20.2"
CONTAINER = "slurm/container/README.md has NVIDIA's image, which brings Transformer Engine"


@dataclass(frozen=True, kw_only=True)
class CudaBuild:
    """The packages of one major version of CUDA.

    Args:
        cuda: the major version.
        oldest_driver: the first branch of drivers that runs it.
        oldest_gpu: lowest compute capability that torch's wheels have code for.
        newest_gpu: the highest; None where they have PTX, which newer GPUs compile.
        torch: pin that replaces the one of constraints.txt; None keeps that.
        index: where pip finds this torch besides PyPI; None for PyPI alone.
        dali: requirement of DALI.
        headers: requirement of the CUDA headers that torch's own requirements leave out (crt/host_config.h).
    """

    cuda: int
    oldest_driver: int
    oldest_gpu: tuple[int, int]
    newest_gpu: tuple[int, int] | None = None
    torch: str | None = None
    index: str | None = None
    dali: str
    headers: str

    @property
    def pins(self) -> str:
        """What `mq` adds to constraints.txt, in pip's format; empty where that fits as it is."""
        if self.torch is None:
            return ""
        return (f"--extra-index-url {self.index}\n" if self.index else "") + f"{self.torch}\n"


# The newest first. Python 3.12 and 3.13 have wheels of each torch; the core of Transformer Engine is one for all.
BUILDS = (
    CudaBuild(
        cuda=13,
        oldest_driver=580,
        oldest_gpu=(7, 5),
        dali="nvidia-dali-cuda130>=2.4",
        # torch requires cuda-toolkit in its own version, which fixes that of the headers.
        headers="cuda-toolkit[crt]",
    ),
    CudaBuild(
        cuda=12,
        oldest_driver=525,
        oldest_gpu=(5, 0),
        newest_gpu=(9, 0),
        torch="torch==2.14.0+cu126",
        index="https://download.pytorch.org/whl/cu126",
        dali="nvidia-dali-cuda120>=2.4",
        headers="nvidia-cuda-nvcc-cu12==12.6.*",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of pip in the environment, or the reason why it cannot succeed here.

    Args:
        what: what is there afterwards.
        pip: arguments of ``pip install``.
        environment: variables of that call.
        builds: whether it compiles.
        lacking: what the machine lacks for it, and how to get that; the step is then left out.
    """

    what: str
    pip: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    builds: bool = False
    lacking: str | None = None


# Requirements of its source distribution, which pip does not install without build isolation. The extension is C++
# alone since 2.x: no nvcc.
_BUILT_WITH = ("setuptools", "wheel", "packaging", "ninja", "nvidia-cudnn-frontend>=1.29")
# What ``mq setup --gpu`` leaves out on purpose: name, and why.
LEFT_OUT = (
    (
        "apex",
        "optional: Transformer Engine has its Adam and norms. NVIDIA's is built from github.com/NVIDIA/apex with nvcc; "
        "the package `apex` on PyPI is another project.",
    ),
    ("flash-attn", "optional: torch and cuDNN have attention kernels. It is built with nvcc: pip install flash-attn."),
)


def choose(driver: tuple[int, ...], capabilities: Iterable[tuple[int, int]]) -> CudaBuild:
    """The newest CUDA that a driver and all GPUs can run.

    Args:
        driver: its version.
        capabilities: compute capabilities of the GPUs that are known; empty restricts nothing.

    Raises:
        UserError: no build fits; says what is too old.
    """
    capabilities = sorted(set(capabilities))
    reasons = []
    for build in BUILDS:
        reason = _why_not(build, driver, capabilities)
        if reason is None:
            return build
        reasons.append(f"  CUDA {build.cuda}: {reason}")
    fix = f"Update the driver to {BUILDS[0].oldest_driver} or newer and reboot. Nothing was changed."
    raise UserError(f"no build of torch fits driver {shown(driver)}:\n" + "\n".join([*reasons, fix]))


def _why_not(build: CudaBuild, driver: tuple[int, ...], capabilities: list[tuple[int, int]]) -> str | None:
    if driver[0] < build.oldest_driver:
        return f"needs a driver of at least {build.oldest_driver}"
    if capabilities and capabilities[0] < build.oldest_gpu:
        return f"has no code for compute capability {_dotted(capabilities[0])} (at least {_dotted(build.oldest_gpu)})"
    if capabilities and build.newest_gpu is not None and capabilities[-1] > build.newest_gpu:
        return f"has no code for compute capability {_dotted(capabilities[-1])} (at most {_dotted(build.newest_gpu)})"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def steps(build: CudaBuild, *, has_cxx: bool) -> Iterator[Step]:
    """What pip installs after the environment of constraints.txt, in order.

    Args:
        build: what ``choose`` found.
        has_cxx: whether the machine has a C++ compiler.
    """
    yield Step(what="queries of GPUs", pip=("nvidia-ml-py>=13",))
    yield Step(what=f"DALI for CUDA {build.cuda}", pip=(build.dali,))
    # By its own name: pip 23, which Python 3.12 brings, does not find the core as an extra (core_cu13 is core-cu13).
    core = f"transformer-engine-cu{build.cuda}=={TRANSFORMER_ENGINE}"
    yield Step(what=f"Transformer Engine {TRANSFORMER_ENGINE}", pip=(f"transformer-engine=={TRANSFORMER_ENGINE}", core))
    yield Step(what="what the extension is built with", pip=(*_BUILT_WITH, build.headers))
    lacking = f"it is compiled, and there is no C++ compiler: install g++ (apt-get install g++). {CONTAINER}."
    yield Step(
        what="Transformer Engine's extension for torch",
        pip=("--no-build-isolation", f"transformer-engine-torch=={TRANSFORMER_ENGINE}"),
        # The headers of the packages that torch itself is linked with, not those of a toolkit on the machine.
        environment={"NVTE_FRAMEWORK": "pytorch", "NVTE_BUILD_USE_NVIDIA_WHEELS": "1"},
        builds=True,
        lacking=None if has_cxx else lacking,
    )
