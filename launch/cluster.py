"""A cluster file: what an infra engineer says of a cluster once. Typed, checked, every field documented."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from launch.text import control_character
from megatron_qwen.config.fields import Form, bound_problems, field_infos, setting, type_name
from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.config.typed_yaml import YamlReader
from megatron_qwen.errors import ConfigError, Problem, did_you_mean
from megatron_qwen.job.settings import EVENTS, Event
from megatron_qwen.resilience.quarantine import NAME as QUARANTINE
from megatron_qwen.slurm import minutes

CLUSTERS = Path(__file__).parent / "clusters"
EXAMPLE = "h100_infiniband"
LOCAL = "local"


def _words(value: object) -> str:
    """A value as text: YAML reads ``1`` and ``true`` where people mean the words."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError


Words = Annotated[str, Form("text", _words)]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One cluster, as its jobs are to be submitted."""

    scheduler: Literal["slurm", "local"] = setting(
        "slurm", doc="slurm; or local, which starts jobs on this machine through submitit's local executor."
    )
    partition: str | None = setting(None, doc="Partition; null is the cluster's default.")
    account: str | None = setting(None, doc="Account to charge.")
    qos: str | None = setting(None, doc="Quality of service.")
    reservation: str | None = setting(None, doc="Reservation to run in.")
    constraint: str | None = setting(None, doc="Node features that jobs need.")
    gpus_per_node: int = setting(doc="GPUs of a node, one rank each; 0 on a cluster of CPUs.", minimum=0)
    gpu_type: str | None = setting(None, doc="Type in Slurm's gres (gpu:TYPE:N); null asks for any.")
    gpu: str | None = setting(None, doc="Device the estimates are for: B200, H200, H100, A100; null estimates nothing.")
    ranks_per_node: int | None = setting(
        None, doc="Ranks of a node; null is gpus_per_node, or one on a cluster of CPUs.", minimum=1
    )
    cpus_per_rank: int | None = setting(None, doc="CPUs of a rank (cpus-per-task); null leaves it to Slurm.", minimum=1)
    memory_per_rank_gib: float | None = setting(
        None, doc="Host memory of a rank; null with exclusive is the whole node, else Slurm's default.", above=0
    )
    time_limit: str = setting("24:00:00", doc="Longest run time of one job, as Slurm writes it (D-HH:MM:SS).")
    exclusive: bool = setting(False, doc="Take whole nodes.")
    signal_delay_s: int = setting(
        300, doc="Seconds before the time limit at which the run is told to save and exit.", minimum=10
    )
    run_root: str = setting("runs", doc="Directory of runs, on a file system that all nodes share.")
    environment: Mapping[str, Words] = setting(
        factory=dict, doc="Variables set in the job: network, NCCL. No secrets: they would be written to files."
    )
    pass_environment: tuple[str, ...] = setting(
        (),
        doc="Names of variables that the job takes from the submitting shell, in addition to PATH, HOME, "
        "USER and the like. Use it for secrets: Slurm keeps the value, no file of this project does.",
    )
    modules: tuple[str, ...] = setting((), doc="Environment modules that are loaded before the ranks start.")
    setup: tuple[str, ...] = setting((), doc="Shell lines that run unchanged before the ranks.")
    container: Literal["pyxis", "apptainer"] | None = setting(
        None, doc="What runs the ranks in a container; null runs them on the node."
    )
    container_image: str | None = setting(None, doc="Image: a name or .sqsh file (pyxis), a .sif file (apptainer).")
    container_mounts: tuple[str, ...] = setting(
        (), doc="Further mounts, SOURCE:TARGET; run directory and code are mounted automatically."
    )
    container_python: str = setting("python3", doc="Interpreter inside the container.")
    health_check: bool = setting(True, doc="Run slurm/healthcheck.sh on every node before the ranks.")
    health_check_arguments: tuple[str, ...] = setting(
        (), doc="Its options, such as --min-disk-gib 20, --loop (see slurm/healthcheck.sh --help)."
    )
    mean_hours_between_faults: float | None = setting(
        None, doc="Of one node, where known; preflight and the run advise on the save interval by it.", above=0
    )
    quarantine_hours: float = setting(
        24.0,
        doc="For how long runs avoid a node that failed (mq launch nodes); 0 shares no such nodes between runs.",
        minimum=0,
    )
    metrics_directory: str | None = setting(
        None, doc="Directory of node_exporter's textfile collector on the nodes; jobs write their metrics there too."
    )
    metrics_port: int | None = setting(
        None,
        doc="Port on which the controller of a job serves its metrics; null serves none.",
        minimum=1,
        maximum=65535,
    )
    metrics_address: str = setting(
        "127.0.0.1", doc="Address on which it listens; 0.0.0.0 answers other machines, without authentication."
    )
    alert_command: tuple[str, ...] = setting(
        (), doc="Program and arguments that the controller calls with each event, as JSON on its standard input."
    )
    alert_webhook_variable: str | None = setting(
        None,
        doc="Name of the variable with the URL to which the controller posts each event. The job takes it from the "
        "submitting shell, as pass_environment does: such URLs often are secrets.",
    )
    alert_on: tuple[Event, ...] = setting(EVENTS[:4], doc="Events that are told.")
    sbatch: Mapping[str, Words] = setting(factory=dict, doc="Further sbatch parameters, such as {switches: 1}.")

    @property
    def ranks(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def quarantine(self) -> Path:
        """Directory of the nodes that the runs of this cluster avoid."""
        return Path(self.run_root).absolute() / QUARANTINE

    @property
    def time_limit_minutes(self) -> int:
        """The time limit, rounded up to whole minutes."""
        found = minutes(self.time_limit)
        assert found is not None
        return max(1, -int(-found // 1))

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every text of the file, with where it stands: all that may reach a script."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, str):
                yield item.name, value
            elif isinstance(value, tuple):
                yield from ((f"{item.name}[{index}]", text) for index, text in enumerate(value))
            elif isinstance(value, Mapping):
                for key, text in value.items():
                    yield f"{item.name}.{key}", text
                    yield f"{item.name} key", key


def known_clusters() -> list[str]:
    """Names of the files in launch/clusters."""
    return sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


def load(name: str) -> Cluster:
    """A cluster by the name of its file in launch/clusters, or by a path.

    Raises:
        ConfigError: there is none, or it says what cannot be; all of it at once.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CLUSTERS / f"{name}.yaml"
    if not path.is_file():
        hint = did_you_mean(name, known_clusters())
        fix = f"no such cluster file.{hint} launch/clusters has {', '.join(known_clusters())}; a path works too."
        raise ConfigError(Problem("--cluster", name, fix))
    return read(read_mapping(path), origin=str(path))


def read(content: dict[str, Any], *, origin: str) -> Cluster:
    """A cluster from the mapping of its file.

    Args:
        content: the mapping.
        origin: name of the file, for messages.

    Raises:
        ConfigError: unknown fields, wrong types, control characters, values out of bounds.
    """
    reader = YamlReader(origin, see="docs/slurm.md lists them.")
    cluster = reader.read(Cluster, content)
    if cluster is not None:
        reader.problems += _problems(cluster, origin)
    reader.raise_problems()
    assert cluster is not None
    return cluster


def changed(cluster: Cluster, **values: Any) -> Cluster:
    """The cluster with other values in some fields.

    Raises:
        ConfigError: they are not legal.
    """
    cluster = replace(cluster, **values)
    origin = "--" + ", --".join(values).replace("_", "-")
    if found := [*bound_problems(origin, cluster), *_problems(cluster, origin)]:
        raise ConfigError(found)
    return cluster


def _problems(cluster: Cluster, origin: str) -> Iterator[Problem]:
    for where, text in cluster.texts():
        if (character := control_character(text)) is not None:
            yield Problem(f"{origin}: {where}", None, f"holds the control character {character}; remove it.")
    if minutes(cluster.time_limit) in (None, 0):
        yield Problem(f"{origin}: time_limit", cluster.time_limit, "must be a time as Slurm writes it (D-HH:MM:SS).")
    elif cluster.signal_delay_s >= cluster.time_limit_minutes * 60:
        yield Problem(f"{origin}: signal_delay_s", cluster.signal_delay_s, "must be shorter than time_limit.")
    webhook = [cluster.alert_webhook_variable] if cluster.alert_webhook_variable is not None else []
    for name in [*cluster.environment, *cluster.pass_environment, *webhook]:
        if not (name.isidentifier() and name.isascii()):
            yield Problem(f"{origin}: environment", name, "is not a name of an environment variable.")
    for name in cluster.sbatch:
        if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            yield Problem(f"{origin}: sbatch", name, "is not an option of sbatch; write it without the leading dashes.")
    if (cluster.container is None) is not (cluster.container_image is None):
        yield Problem(
            f"{origin}: container",
            cluster.container,
            "container and container_image require each other; set both or neither.",
        )
    if cluster.gpu_type is not None and not cluster.gpus_per_node:
        yield Problem(f"{origin}: gpu_type", cluster.gpu_type, "requires gpus_per_node above 0.")


def reference() -> str:
    """The table of fields, for docs/slurm.md."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for info in field_infos("cluster", Cluster).values():
        default = "required" if info.default is MISSING else f"`{_shown(info.default)}`"
        lines.append(f"| `{info.name}` | {type_name(info.type)} | {default} | {info.doc} |")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return "[" + ", ".join(default) + "]"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)
