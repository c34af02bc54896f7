"""Every message that travels, typed. Frozen, told apart by `kind`, validated once where bytes come in.

Evolution: a new field gets a default, an unknown field is ignored, a kind or a field is never reused for another thing;
`schema_version` changes only when an old reader would misread a new message.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from common.wire.to_master import (
    Admit,
    Alive,
    AskStatus,
    Change,
    Continue,
    Fetch,
    FetchAssets,
    Finished,
    Get,
    InstructionAck,
    Join,
    Kick,
    Leave,
    Pause,
    Resume,
    Stop,
    UpdateChunk,
    UpdateManifest,
    Words,
)
from common.wire.to_node import (
    Answer,
    AssetChunk,
    Finish,
    Instruction,
    Introduce,
    Notice,
    ParameterChunk,
    Pulse,
    Receipt,
    Resend,
    Rule,
    StatusReport,
    Withdrawn,
    WordsWanted,
)

ToMaster = (
    Join
    | Get
    | Continue
    | Fetch
    | FetchAssets
    | Words
    | Finished
    | Leave
    | Alive
    | AskStatus
    | Stop
    | Change
    | Kick
    | Admit
    | Pause
    | Resume
    | InstructionAck
    | UpdateManifest
    | UpdateChunk
)
ToNode = (
    Instruction
    | WordsWanted
    | Rule
    | Receipt
    | Resend
    | Notice
    | Finish
    | Introduce
    | Withdrawn
    | Answer
    | Pulse
    | StatusReport
    | ParameterChunk
    | AssetChunk
)
AnyMessage = Annotated[ToMaster | ToNode, Field(discriminator="kind")]
