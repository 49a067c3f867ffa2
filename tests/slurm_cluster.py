"""A real Slurm on this machine: a controller and two nodes, on loopback only, for tests of what it does with a run."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NODES = ("node1", "node2")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "scancel")
_CONF = """
ClusterName=lab
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
ReturnToService=2
KillWait=30
SlurmdTimeout=8
TCPTimeout=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 Gres=gpu:2"


def why_not() -> str | None:
    """Why no Slurm can be started here; None where it can. Installs Debian's packages where that is possible."""
    if os.geteuid() != 0:
        return "Slurm's daemons start jobs as other users: run these tests as root"
    if not all(map(shutil.which, _PROGRAMS)) and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        command = ("apt-get", "install", "-y", "-q", "--no-install-recommends", "slurm-wlm")
        subprocess.run(command, env=environment, capture_output=True, timeout=300)
    missing = [name for name in _PROGRAMS if not shutil.which(name)]
    return f"Slurm is not installed and could not be (no {missing[0]}): apt-get install slurm-wlm" if missing else None


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Two nodes of 4 CPUs and 2 pretended GPUs; gives the environment in which Slurm's commands find them."""
    for name in ("state", "spool", "run", "log"):
        (folder / name).mkdir(parents=True)
    ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(_NODE.format(name=name, port=port) for name, port in zip(NODES, ports[1:], strict=True))
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(folder=folder, ports=ports, nodes=nodes))
    gpus = [folder / f"gpu{number}" for number in range(2)]
    for gpu in gpus:
        gpu.touch()
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
    environment = os.environ | {"SLURM_CONF": str(conf)}
    commands = [("slurmctld", "-D", "-c"), *(("slurmd", "-D", "-N", name) for name in NODES)]
    daemons = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    try:
        wait_until(lambda: slurm(environment, "sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 60, folder)
        yield environment
    finally:
        slurm(environment, "scancel", "--state=RUNNING", "--full", "--signal=KILL")
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def slurm(environment: dict[str, str], *command: str) -> str:
    """What one of Slurm's commands prints."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def job(environment: dict[str, str], number: str) -> dict[str, str]:
    """What the controller says of a job."""
    described = slurm(environment, "scontrol", "show", "job", number, "--oneliner")
    return dict(field.split("=", 1) for field in described.split() if "=" in field)


def wait_until(condition, seconds: float, folder: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in folder.glob("log/*.log"))
            raise AssertionError(f"it did not happen within {seconds:.0f} s\n{logs}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
