"""Variables of the environment that look like settings and are none."""

from __future__ import annotations

import logging
import os
import re

from reft_runtime.errors import nearest
from server.settings import Settings

logger = logging.getLogger("reft.server")

PREFIX = "REFT_"

OTHERS = ("URL", "CACHE", "RANK_KEY")
"""Variables of commands, of the runtime and of its ranks."""

SERVICE = re.compile(r"(?:.+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_.+)?|PORT_\d+_(?:TCP|UDP)(?:_.+)?)")
"""Names that Kubernetes makes of a Service's name, for every container beside it."""


def tell_unknown_variables() -> None:
    """Log each variable that begins as settings do, and that nothing reads; never its value."""
    known = [*(name.upper() for name in Settings.model_fields), *OTHERS]
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix(PREFIX)
        if not variable.upper().startswith(PREFIX) or name in known or SERVICE.fullmatch(name):
            continue
        like = nearest(name, known, 1)
        hint = f" Did you mean {PREFIX}{like[0]}?" if like else ""
        logger.warning("%s is no setting of this server, and is ignored.%s", variable, hint)
