"""The pytest plugin: the fixture `message_log`. Every pytest loads it where this is installed, so it loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ._log import Log


@pytest.fixture
def message_log(request: pytest.FixtureRequest) -> Iterator[Callable[[Path | str], Log]]:
    """Opens a recorded message log (an export, or a master's state directory), and closes it after the test.

    A relative path is looked for beside the test's file, and then below pytest's root folder.

        def test_the_run_of_may(message_log):
            log = message_log("logs/may.jsonl.gz")
            assert log.replay().identical
            assert log.refold(rule="fedavg").distance < 0.1
    """
    from ._log import Log

    with ExitStack() as closing:

        def opened(path: Path | str) -> Log:
            places = [folder / path for folder in (request.path.parent, request.config.rootpath)]
            return closing.enter_context(Log.open(next((each for each in places if each.exists()), places[0])))

        yield opened
