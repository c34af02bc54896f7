"""Encoder types of other packages: what they raise or give in error is one line that names them, always."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from structlog.testing import capture_logs

from common.encoders import encoder_type_names, get_encoder_type
from common.encoders.base import EncoderModel, EncoderType
from common.encoders.owners_code import MODEL_METHODS, TYPE_METHODS, owners_code
from common.errors import EXIT_USER_ERROR, BrokerUnavailable, OwnersCodeError, UserError
from common.wire.update_rule import InnerOptimizer
from deploy.cli import guarded
from node_service.training.trainer import Trainer
from tests.faults.tiny import ASSETS, TinyEncoderType, TinyModel, samples

#: A package with three types: `good` works, `failing` raises in every method, `odd` gives what nobody can use.
PACKAGE = '''
from tests.faults.tiny import TinyEncoderType, TinyModel
from common.encoders.owners_code import MODEL_METHODS, TYPE_METHODS

def failing(*args, **kwargs):
    raise ValueError("no sound\\nin sample 'patient Jones'")

class Good(TinyEncoderType):
    pass

Failing = type("Failing", (), {"name": "failing", **{method: failing for method in TYPE_METHODS}})

class FailingModel(TinyModel):
    """Fails in the one method that `fails` names."""
    fails = ""

for method in MODEL_METHODS:
    def either(self, *args, method=method, **kwargs):
        return failing() if self.fails == method else getattr(TinyModel, method)(self, *args, **kwargs)
    setattr(FailingModel, method, either)

class Modelled(TinyEncoderType):
    def build(self, architecture, private, seed):
        return FailingModel(8)

class Odd(TinyEncoderType):
    def architecture(self, overrides):
        return {"sizes": (1, 2)} if not overrides else {"set": {1}}
    def architecture_of(self, directory):
        return None, {}
    def assets(self, architecture, sources):
        return architecture, {"words": "not bytes"}
    def initial(self, architecture, seed):
        return {"weight": [1.0]}
    def fit_private(self, samples, architecture, settings, assets):
        return None
    def build(self, architecture, private, seed):
        return object()

class Half:
    name = "half"
    def architecture(self, overrides): ...
    build = None

class Demanding(TinyEncoderType):
    def __init__(self, path): ...

ready = Good()
number = 7
'''
ENTRIES = {
    "good": "other_types:Good", "ready": "other_types:ready", "failing": "other_types:Failing",
    "modelled": "other_types:Modelled", "odd": "other_types:Odd", "half": "other_types:Half",
    "demanding": "other_types:Demanding", "number": "other_types:number", "none": "other_types:absent",
    "nowhere": "no_such_package:Type", "syntax": "broken_syntax:Type", "dying": "broken_import:Type",
    "exiting": "broken_exit:Type", "text": "other_types:Good",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package, installed as far as importlib.metadata can tell."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "other_types.py").write_text(PACKAGE)
    (folder / "broken_syntax.py").write_text("class Type\n")
    (folder / "broken_import.py").write_text("raise RuntimeError('the licence server is away')\n")
    (folder / "broken_exit.py").write_text("import sys\nsys.exit('usage: ...')\n")
    info = folder / "other_sounds-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-sounds\nVersion: 2.1\n")
    lines = "".join(f"{name} = {value}\n" for name, value in ENTRIES.items())
    (info / "entry_points.txt").write_text(f"[shared_encoder.encoder_types]\n{lines}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def refusal(call: Callable[[], Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_good_type_works_behind_its_proxy_and_a_built_in_one_has_none() -> None:
    good, plain = get_encoder_type("good"), TinyEncoderType()
    assert good.name == get_encoder_type("ready").name == "tiny"
    assert type(get_encoder_type("text")).__name__ == "TextEncoderType", "a built-in name cannot be taken"
    assert set(ENTRIES) < {*encoder_type_names()}
    architecture = good.architecture({"width": 8})
    architecture, assets = good.assets(architecture, {})
    assert assets == ASSETS
    spec = good.fit_private(samples(0), architecture, {}, assets)
    assert (architecture, spec) == (
        plain.architecture({"width": 8}),
        plain.fit_private(samples(0), architecture, {}, assets),
    )
    model = good.build(architecture, spec, seed=3)
    same = plain.build(architecture, spec, seed=3)
    assert isinstance(model, TinyModel) and list(model.state_dict()) == list(same.state_dict())
    inner = InnerOptimizer()
    ours, theirs = (Trainer(m, m.encode(samples(0)), inner, seed=0, device="cpu") for m in (same, model))
    assert [ours.step() for _ in range(3)] == [theirs.step() for _ in range(3)]


def test_a_guarded_model_is_copied_and_pickled_like_another() -> None:
    model = get_encoder_type("good").build({"width": 8}, {}, seed=3)
    stored = io.BytesIO()
    torch.save(model, stored)
    loaded = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert isinstance(other, EncoderModel)
        own = other.shared_parameters()["weight"]
        assert own is not model.shared_parameters()["weight"] and own in set(other.parameters())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "'no_such_package:Type' does not load, it raised ModuleNotFoundError: No module named 'no_such_pa"),
        ("none", "'other_types:absent' does not load, it raised AttributeError: module 'other_types' has no attribute"),
        ("syntax", "'broken_syntax:Type' does not load, it raised SyntaxError: "),
        ("dying", "'broken_import:Type' does not load, it raised RuntimeError: the licence server is away"),
        ("exiting", "'broken_exit:Type' does not load, it raised SystemExit: usage: ..."),
        ("demanding", "'other_types:Demanding' does not load, it raised TypeError: "),
        (
            "half",
            "a Half, not an encoder type: it lacks architecture_of, assets, initial, fit_private, build, export_shared",
        ),
        ("number", "an int, not an encoder type: it lacks name, architecture, "),
    ],
)
def test_f18_a_type_that_does_not_load_names_package_entry_point_and_exception(name: str, said: str) -> None:
    line = str(refusal(lambda: get_encoder_type(name)))
    assert line.startswith(f"encoder type {name!r} (package other-sounds): its entry point ") and said in line


CALLS: dict[str, Callable[[EncoderType], Any]] = {
    "architecture": lambda kind: kind.architecture({"a": 1}),
    "architecture_of": lambda kind: kind.architecture_of(Path()),
    "assets": lambda kind: kind.assets({}, {}),
    "initial": lambda kind: kind.initial({}, 0),
    "fit_private": lambda kind: kind.fit_private([1], {}, {}, {}),
    "build": lambda kind: kind.build({}, {}, 0),
    "export_shared": lambda kind: kind.export_shared(Path(), {}, {}, "", {}),
}


@pytest.mark.parametrize("method", TYPE_METHODS)
def test_f18_whatever_a_type_raises_is_said_as_its_own(method: str) -> None:
    with capture_logs() as logs:
        error = refusal(lambda: CALLS[method](get_encoder_type("failing")))
    assert str(error).startswith("encoder type 'failing' (package other-sounds) raised ValueError: no sound (")
    assert f"in its {method};" in str(error)
    assert isinstance(logs[0]["exc_info"], ValueError) and logs[0]["log_level"] == "debug", "the traceback is kept"
    assert isinstance(error, OwnersCodeError)
    assert error.public == f"encoder type 'failing' (package other-sounds) raised ValueError in its {method}"


@pytest.mark.parametrize("method", ["architecture", "architecture_of", "assets", "initial", "fit_private", "build"])
def test_f18_what_a_type_gives_in_error_is_said_as_its_own(method: str) -> None:
    line = str(refusal(lambda: CALLS[method](get_encoder_type("odd"))))
    assert line.startswith(f"encoder type 'odd' (package other-sounds): its {method} gave ")
    assert get_encoder_type("odd").architecture({}) == {"sizes": [1, 2]}, "as every later reader sees it"


@pytest.mark.parametrize("method", [method for method in MODEL_METHODS if method != "private_parameters"])
def test_f18_whatever_a_model_raises_is_said_as_its_own(method: str, tmp_path: Path) -> None:
    """In a training step too: the command ends with exit code 2 and that line."""
    model = get_encoder_type("modelled").build({}, {}, 0)
    rows = samples(0)
    trainer = Trainer(model, model.encode(rows), InnerOptimizer(), seed=0, device="cpu")
    trainer.step()
    model.fails = method  # type: ignore[assignment]
    calls: dict[str, Callable[[], Any]] = {
        "shared_parameters": model.shared_parameters,
        "encode": lambda: model.encode(rows),
        "counted": lambda: model.counted({}),
        "held_out_losses": lambda: model.held_out_losses(rows, torch.Generator()),
        "pooled": lambda: model.pooled(rows),
        "features": lambda: model.features(rows),
        "export": lambda: model.export(tmp_path),
    }
    call = calls.get(method, trainer.step)
    line = str(refusal(call))
    assert line.startswith("encoder type 'modelled' (package other-sounds) raised ValueError: no sound (")
    assert f"in its {method};" in line
    assert guarded(call) == EXIT_USER_ERROR


@pytest.mark.parametrize("given", [None, torch.zeros(2), 0.5])
def test_f18_a_loss_that_is_no_scalar(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyModel, "loss", lambda self, batch: given)
    model = get_encoder_type("good").build({"width": 8}, {}, 0)
    assert "its loss gave " in str(refusal(lambda: model.loss({})))


def test_f18_a_batch_that_is_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyModel, "batch", lambda self, encoded, size, generator: [torch.zeros(2)])
    model = get_encoder_type("good").build({"width": 8}, {}, 0)
    line = str(refusal(lambda: model.batch(None, 1, torch.Generator())))
    assert line.endswith("its batch gave a list, not tensors by name; mend it")


def test_our_own_errors_and_those_of_our_disk_pass_as_they_are() -> None:
    for error in (BrokerUnavailable("away"), UserError("correct it"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, owners_code("theirs"):
            raise error
        assert caught.value is error
    with pytest.raises(PermissionError), owners_code("theirs", "export_shared"):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(OwnersCodeError, match="theirs raised PermissionError"), owners_code("theirs", "fit_private"):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(OwnersCodeError, match="theirs raised StopIteration: no message"), owners_code("theirs"):
        raise StopIteration


def test_a_long_error_of_theirs_is_cut_so_that_it_fits_into_a_message() -> None:
    with pytest.raises(OwnersCodeError) as caught, owners_code("theirs"):
        raise ValueError("x" * 100_000)
    assert len(str(caught.value)) < 500


def test_the_proxy_knows_every_method_of_the_protocol() -> None:
    def named(of: Any, *bases: type) -> set[str]:
        known = {name for base in bases for name in dir(base)}
        return {name for name, value in vars(of).items() if callable(value) and not name.startswith("_")} - known

    assert set(TYPE_METHODS) == named(EncoderType, Protocol)  # type: ignore[arg-type]
    assert set(MODEL_METHODS) == named(EncoderModel, torch.nn.Module)


def test_a_type_of_another_package_is_found_without_torch(tmp_path: Path) -> None:
    methods = "".join(f"    def {method}(self): ...\n" for method in TYPE_METHODS)
    (tmp_path / "theirs.py").write_text(f"class Sound:\n    name = 'sound'\n{methods}")
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[shared_encoder.encoder_types]\nsound = theirs:Sound\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from common.encoders import encoder_type_names, get_encoder_type\n"
        "assert encoder_type_names() == ['text', 'image', 'sound'], encoder_type_names()\n"
        "assert get_encoder_type('sound').name == 'sound' and 'torch' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
