"""What every verb does besides its own work: it knows what belongs to the job, and Ctrl-C is no error."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from typer.core import TyperCommand

from tricorn.errors import Interrupted, UsageError
from tricorn.fields import nearest
from tricorn.job import belongs


class Verb(TyperCommand):
    """A command whose unknown options are looked for in the job, too, if it takes one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # typer's classes of errors are its own; that of an unknown option names it
            option = getattr(error, "option_name", "")
            name = option.lstrip("-").replace("-", "_")
            own = [name for name in (parameter.name for parameter in self.params) if name]
            if "job" not in own or not name or nearest(name, own, alike=0.8) or not (where := belongs(name)):
                raise
            said = f"no such option: {option}; it belongs to the job"
            raise UsageError(said, remedy=f"Set {where} in the job's file.") from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            again = shlex.join(["tricorn", *sys.argv[1:]])
            raise Interrupted("interrupted by the user", remedy=f"Start again with `{again}`.") from None
