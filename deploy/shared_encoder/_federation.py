"""A federation in this process, in a few lines: for notebooks, and for tests of what is built on one."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

from ._encoder import Encoder, load_encoder
from ._log import Log

#: Steps a second of a node whose speed is not given, by the virtual clock.
_SPEED = 10.0


@dataclass(frozen=True)
class Federated:
    """What came of a `federation`. `directory` holds the encoder, the master's state and what each node keeps; one that
    was not named in the call goes with this object.

    By node: `updates` that were counted and the sum of their `weights`; and the masked loss of its held-out samples
    (nats for text), each time within private parts of its own: `before` any training, `after` it with the shared
    encoder, and `finished` with the copy of it that the node tuned alone at the end.

    >>> found = federation(CORPORA, versions=3)
    >>> found.version, sorted(found.updates)
    (3, ['north', 'south'])
    >>> all(found.after[node] < found.before[node] for node in CORPORA)
    True
    >>> print(found)
    Federated(text-... version 3; held-out loss north ... → ..., south ... → ...; in ...)
    """

    id: str
    version: int
    directory: Path
    updates: Mapping[str, int]
    weights: Mapping[str, float]
    before: Mapping[str, float]
    after: Mapping[str, float]
    finished: Mapping[str, float]

    def encoder(self, node: str | None = None) -> Encoder:
        """The shared encoder, open; or the finished copy of a `node`. Raises UserError for a node that is not there.

        >>> federation(CORPORA, versions=2).encoder("north").features(["patient 3"]).shape
        (1, 64)
        """
        if node is None:
            return load_encoder(self.directory / "encoder")
        if node not in self.updates:
            raise UserError(f"no node {node!r} took part; there are: {', '.join(self.updates)}")
        return load_encoder(self.directory / "nodes" / node / "encoders" / self.id / "model")

    def log(self) -> Log:
        """The message log of the run, open.

        >>> federation(CORPORA, versions=2).log().replay().identical
        True
        """
        log = Log.open(self.directory / "master")
        log._keeps = self
        return log

    def __repr__(self) -> str:
        """In a line: what a notebook shows."""
        losses = ", ".join(f"{node} {self.before[node]:.3f} → {self.after[node]:.3f}" for node in self.before)
        return f"Federated({self.id} version {self.version}; held-out loss {losses}; in {self.directory})"


def federation(
    corpora: Mapping[str, Sequence[Any] | Path | str],
    *,
    versions: int = 10,
    rule: str = "return-count",
    architecture: Mapping[str, Any] | None = None,
    type: str = "text",
    speeds: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Federated:
    """Train one shared encoder over the `corpora` of several nodes, in this process and thread, and give what came.

    The master and the nodes are the real ones, over an embedded broker and under a virtual clock: the same arguments
    give the same encoder, bit for bit. With its defaults it is tiny, and two nodes train it in some seconds.

    `corpora`: by the node's name its samples, texts in a list (or one uint8 array of images with `type` "image"), or
    the path or glob of files that a node would read. A tenth of them is held out. `versions` of the encoder are made by
    the aggregation `rule`; a node returns an update every 10 steps. `architecture` says how the encoder is built
    ({"hidden_size": 32}). `speeds`: steps a second of some nodes, 10 for the others. `settings`: whatever else a
    configuration file can say, shaped as one, {"update": {"inner": {"lr": 1e-3}}}; variables of the environment hold
    as they do for the command. `out`: an empty folder for what comes of it. `progress` is called with (versions made,
    versions in all), and may raise to end it.

    Raises UserError for samples, settings and an `out` that do not serve.

    >>> CORPORA = {
    ...     "north": [f"patient {number} was seen on day {number % 7}" for number in range(60)],
    ...     "south": [f"the dose of day {number % 5} was {number} mg" for number in range(60)],
    ... }
    >>> found = federation(CORPORA, versions=2)
    >>> encoder = found.encoder()
    """
    from deploy.embedded import embedded_config, read_corpora, train_embedded
    from deploy.undisturbed import undisturbed
    from master_service.decisions.settings import overlaid

    told = progress or (lambda done, of: None)
    given = {
        "encoder": {"get": type, "architecture": dict(architecture or {})},
        "rule": {"preset": rule},
        "stop": {"versions": versions},
    }
    pace = {**dict.fromkeys(corpora, _SPEED), **(speeds or {})}
    for node, speed in pace.items():
        if node not in corpora or not 0 < speed < float("inf"):
            raise UserError(f"speeds: {node!r}: {speed}; give nodes of the corpora steps a second above 0")
    with undisturbed():
        read = read_corpora(corpora, type)
        directory = Path(tempfile.mkdtemp(prefix="shared-encoder-") if out is None else out)
        try:
            config = embedded_config(directory, read, overlaid(given, settings or {}), seed)
            outcome = train_embedded(config, read, pace, lambda done: told(done, config.stop.versions or done))
        except BaseException:
            if out is None:
                shutil.rmtree(directory, ignore_errors=True)
            raise
    found = Federated(
        outcome.encoder,
        outcome.version,
        directory,
        **{
            name: {node: getattr(each, name) for node, each in outcome.nodes.items()}
            for name in ("updates", "weights", "before", "after", "finished")
        },
    )
    if out is None:
        weakref.finalize(found, shutil.rmtree, directory, ignore_errors=True)
    return found
