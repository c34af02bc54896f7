"""What the environment may say beside the settings, which are `SHARED_ENCODER_SECTION__KEY`."""

from __future__ import annotations

#: What our variables begin with.
PREFIX = "SHARED_ENCODER_"
#: For `--credentials FILE`: where a container has its party's file.
CREDENTIALS = f"{PREFIX}CREDENTIALS"
