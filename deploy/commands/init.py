"""What `shared-encoder init` writes: a configuration to begin with, for the master and for each node."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError

#: What a line begins with that is a setting once this is taken away.
OFF = "#: "

_TOP = """\
# One file for all: each party reads its own section, and `shared-encoder` says in one line what it does not know.
# What begins with "{off}" is off, and shows what else there is. Above the file stands the environment
# (SHARED_ENCODER_STOP__VERSIONS=50), and above both stand flags.
#   shared-encoder master --config {name}
#   shared-encoder node {first} --config {name}        # at its organisation, with its section alone

[broker]
url = "amqp://guest:guest@127.0.0.1:5672/"     # of a fresh RabbitMQ on this machine; elsewhere amqps://, docs/tls.md
#: ca_file = "ca.pem"                          # who signed the broker's certificate
#: password_file = "password.txt"              # better than in the url
#: accounts = "required"                       # one for each party: `shared-encoder broker init`, docs/operations.md

[master]
state_dir = "master-state"                     # the message log: keep it, and back it up (`log backup`)
export_dir = "encoder"                         # the finished encoder, for AutoModel.from_pretrained
#: retention = "10%"                           # of the disk, for updates that can be replayed; "all", or a size
#: operators = ["alice"]                       # who may ask for encoders and stop them, with accounts
exit_when_finished = true

[encoder]
get = "{type}"
min_nodes = {count}                                  # training begins once so many are there
#: reference = "texts/"                        # texts that no node holds, to train the shared vocabulary on
#: architecture = {{ hidden_size = 256, num_hidden_layers = 4 }}

[rule]
preset = "return-count"                        # or fedavg, fedasync, fedbuff, diloco
#: outer = {{ lr = 1.0 }}

[update]
when = {{ steps = 25 }}                          # when a node returns: steps, seconds, samples, loss change, drift
#: encoding = "int4"                           # half the bytes of int8, the default

[stop]
versions = 400
#: plateau = {{ patience = 20 }}                 # or once the held-out loss has not fallen for so many versions
"""
_NODE = """
[nodes.{node}]
state_dir = "node-state/{node}"
exit_when_finished = true
#: device = "cuda"                             # "auto" takes a GPU that is there
#: sent_file = "sent-{node}.jsonl"             # a line for each message that leaves, for your auditor
#: accept = {{ types = ["{type}"], hours = "22:00-06:00" }}

[nodes.{node}.corpus]
type = "{type}"
path = {path}
"""
_PATHS = {"text": '"corpus/{node}/**/*.txt"', "image": '"corpus/{node}"'}


def written(nodes: int, encoder_type: str, name: str) -> str:
    """The text of the file. Raises UserError for a type of which this does not know what its samples look like."""
    if encoder_type not in _PATHS:
        raise UserError(f"--type {encoder_type}: there are: {', '.join(_PATHS)}")
    names = [f"node-{index + 1}" for index in range(nodes)]
    text = _TOP.format(off=OFF.strip(), name=name, first=names[0], type=encoder_type, count=nodes)
    for node in names:
        text += _NODE.format(node=node, type=encoder_type, path=_PATHS[encoder_type].format(node=node))
    return text


def write_configuration(file: Path, nodes: int, encoder_type: str) -> None:
    """Write it, and say what comes next. Raises UserError, also for a file that is there."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; give the name of a file")
    text = written(nodes, encoder_type, str(file))
    try:
        with file.open("x") as out:
            out.write(text)
    except FileExistsError:
        raise UserError(f"{file} is there already; give another name") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    print(f"{file}: a master and {nodes} node(s). Put texts into the paths of [nodes.….corpus], or change them; then")
    print(f"  shared-encoder corpus check --config {file}")
    print(f"  shared-encoder master --config {file}")
    print(f"  shared-encoder node node-1 --config {file}")
