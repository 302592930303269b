"""`python -m engine serve --ray`: the server's application on Ray Serve, an engine a replica.

Ray's proxies take HTTP and hand each request to the less busy of two replicas. A replica is the application
of engine/serve, in a process of its own: it streams, refuses, aborts and logs as that does.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.schema import ApplicationStatus, LoggingConfig
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from engine.cluster import Cluster, config_of_each, connected, is_own
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import InputError
from engine.output import ERRORS
from engine.serve.app import Limits, Server
from engine.serve.command import KEEP_ALIVE_S, ServeOptions, announce, listen, log_requests, read_key
from engine.serve.guard import Guard
from engine.serve.prometheus import CONTENT_TYPE, joined

LOG = logging.getLogger(__name__)
APPLICATION, DEPLOYMENT = "dynamic-batch", "engine"  # their names on the cluster
BESIDE = 64  # requests that a replica may have beyond its limit: those that it refuses, and /health
HEALTH_S = 5.0  # from one look at a replica to the next
LOOK_S = 1.0  # from one look at the application to the next
PAGE_S = 5.0  # for the metrics of all replicas
GRACE_S = 30.0  # for Ray to remove what has drained
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)  # the guard logs requests


class ReplicaServer(Server):
    """A server that tells the metrics of all replicas, whichever is asked: the busy ones seldom are."""

    async def metrics(self, request: Request) -> Response:
        self.ready()
        replicas = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        asked = replicas.broadcast("page")
        try:
            pages = await asked.results_async(timeout_s=PAGE_S, return_exceptions=True)
        except TimeoutError as error:  # one is stuck: the others' are worth as much without it
            LOG.warning("metrics of this replica alone: %r", error)
            pages = [self.ready().prometheus.text()]
        for page in pages:
            if isinstance(page, Exception):
                LOG.warning("a replica told no metrics: %r", page)
        text = joined(page for page in pages if isinstance(page, bytes))
        return Response(text, media_type=CONTENT_TYPE)


class Replica:
    """One of the engines, and the application in front of it.

    Args:
        spec, config, name: of the model, as `Engine.from_pretrained` and clients have them.
        limits: of this engine's requests.
        key, hosts: as Guard has them.
    """

    of_process: ClassVar[Replica]  # Ray gives each a process

    def __init__(
        self, spec: str, config: EngineConfig, name: str, limits: Limits, key: str | None,
        hosts: Sequence[str] | None,
    ) -> None:  # fmt: skip
        log_requests()
        self.server = ReplicaServer(name, limits)
        engine = Engine.from_pretrained(spec, config, progress=False)
        self.server.start(engine, serve.get_replica_context().replica_id.unique_id)
        self.guard = Guard(self.server.app, key, hosts, tells_id=False)  # Ray's proxy does
        Replica.of_process = self

    async def page(self) -> bytes:
        """Return this replica's own metrics."""
        return self.server.ready().prometheus.text()

    async def check_health(self) -> None:
        """Raise RuntimeError once the engine has ended: Ray begins another replica then."""
        if self.server.ended is not None:
            raise RuntimeError(self.server.ended)

    def __del__(self) -> None:
        if hasattr(self, "server"):
            self.server.close()


def application() -> ASGIApp:
    """Return the application of the replica that this process is."""
    return Replica.of_process.guard


def run(options: ServeOptions, cluster: Cluster) -> None:
    """Serve until SIGTERM or Ctrl-C; then take nothing new, and let what is on its way end.

    A cluster that was begun here ends too; from another, only the application is removed.

    Raises:
        InputError: for a key that cannot be read, a host that needs one, a port that is taken, a cluster that
            is not there, has no room or has another application in this one's place, and a model that cannot
            be loaded.
    """
    key = read_key(options)
    if is_own():
        listen(options.host, options.port).close()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        with connected():
            _serve(options, key, cluster)
    except SystemExit as told:
        if told.code != signal.SIGTERM:  # as Ray obeys it while it begins
            raise


def _serve(options: ServeOptions, key: str | None, cluster: Cluster) -> None:
    """Deploy the application, and remove it once this process is told to end."""
    with _told_to_end() as told:
        _check_room(cluster)
        found = serve.status()
        if APPLICATION in found.applications:
            raise InputError(f"this cluster serves {APPLICATION!r} already: end that first")
        if found.proxies and key is None and not options.without_key:
            where = "at a host and port of its own, where others may reach it"
            raise InputError(f"Ray Serve runs on this cluster already, {where}: give a key, or --without-key")
        http = {"host": options.host, "port": options.port, "keep_alive_timeout_s": KEEP_ALIVE_S}
        serve.start(http_options=http, logging_config=QUIET)
        try:
            _deploy(options, key, cluster, hosts=None if found.proxies else options.hosts)
            _watch(options, told)
        finally:
            _remove(options.drain_s, all_of_serve=not (found.proxies or is_own()))


@contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets. Ctrl-C once more raises KeyboardInterrupt."""
    told = threading.Event()

    def tell(number: int, frame: object) -> None:
        told.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = [(number, signal.signal(number, tell)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield told
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _check_room(cluster: Cluster) -> None:
    """Raise InputError where a cluster that does not grow has no room for so many replicas."""
    for name, of_each in (("GPU", cluster.gpus), ("CPU", cluster.cpus or 0.0)):
        have = ray.cluster_resources().get(name, 0.0)
        # What is less than one is of one and the same GPU.
        room = int(have) * int(1 / of_each) if 0 < of_each < 1 else int(have / (of_each or 1.0))
        if is_own() and of_each and room < cluster.replicas:
            each = f"replicas={cluster.replicas}, each with {name.lower()}s={of_each:g}"
            raise InputError(f"{each}, do not fit: this machine has {have:g} {name}s; ask for less")


def _deploy(options: ServeOptions, key: str | None, cluster: Cluster, hosts: Sequence[str] | None) -> None:
    """Have Ray begin the replicas."""
    deployed = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=cluster.replicas,
        ray_actor_options={"num_cpus": _cpus(cluster), "num_gpus": cluster.gpus},
        max_ongoing_requests=options.limits.max_requests + BESIDE,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=options.drain_s,
        max_constructor_retry_count=1,  # a model that cannot be loaded is told at once
        logging_config=QUIET,
    )(serve.ingress(application)(Replica))
    target = deployed.bind(
        options.model, config_of_each(options.config, cluster), options.name, options.limits, key, hosts
    )
    try:
        serve.run_many([serve.RunTarget(target, APPLICATION)], wait_for_applications_running=False)
    except RayTaskError as error:  # the controller's: another application has the route
        raise InputError(f"the cluster does not take it: {str(error).splitlines()[-1]}") from None


def _cpus(cluster: Cluster) -> float:
    """Return the CPUs of each replica: on a cluster of our own an equal share of all, unless it was said."""
    if cluster.cpus is not None:
        return cluster.cpus
    if not is_own():
        return 1.0
    share = ray.cluster_resources()["CPU"] / cluster.replicas
    return float(int(share)) if share >= 1 else int(share * 1e4) / 1e4  # as finely as Ray counts


def _watch(options: ServeOptions, told: threading.Event) -> None:
    """Say when requests can come, and what the cluster says of its replicas, until it is told to end.

    Raises:
        InputError: if no replica could be started, or somebody else removed the application.
    """
    announced, said = False, ""
    while not told.wait(LOOK_S):
        found = serve.status().applications.get(APPLICATION)
        if found is None:
            raise InputError("the application was removed from the cluster by somebody else")
        message = " ".join(one.message for one in found.deployments.values()).strip()
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise InputError(f"no replica could be started: {(message or found.message).splitlines()[-1]}")
        if found.status == ApplicationStatus.RUNNING and not announced:
            announced = True
            announce(options)
        elif message and message != said:
            ERRORS.print(message, markup=False, highlight=False, soft_wrap=True)
        said = message


def _remove(drain_s: float, all_of_serve: bool) -> None:
    """Have the replicas end what they do, and the application removed.

    Args:
        drain_s: how long they may take.
        all_of_serve: end Ray Serve too, if it has no other application.

    Raises:
        TimeoutError: if Ray does not do it.
    """
    until = time.monotonic() + drain_s + GRACE_S
    while APPLICATION in serve.status().applications:
        try:
            serve.delete(APPLICATION)
        except TimeoutError:  # it waits for a minute
            if time.monotonic() > until:
                raise
    if all_of_serve and not serve.status().applications:
        serve.shutdown()
