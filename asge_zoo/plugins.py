"""What installed packages provide, read from their metadata without importing any of them.

A package names each of its components by an entry point in the group `asge_zoo.<component>`, and the entry point is
named as the kind in a spec: `"acme.lp" = "acme_lp:LpPool"` under `[project.entry-points."asge_zoo.pooling"]`.
"""

import os
import re
import textwrap
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from asge_zoo.errors import PluginError

GROUPS = ("backbone", "rule", "goodness", "projection", "pooling", "norm", "prediction", "dataset")
SWITCH = "ASGE_ZOO_PLUGINS"  # `none`, or the distributions whose plugins may be used, separated by commas


@dataclass(frozen=True)
class Plugin:
    """A component that an installed distribution says it provides.

    Attributes:
        kind: as a spec names it.
        component: one of `GROUPS`.
        distribution, version: of the package.
        entry_point: where its class is.
    """

    kind: str
    component: str
    distribution: str
    version: str
    entry_point: EntryPoint

    @property
    def package(self) -> str:
        """Distribution and version."""
        return f"{self.distribution} {self.version}"

    def wrong(self, why: str) -> PluginError:
        """That it does not keep its word."""
        return PluginError(
            f"{self.component} '{self.kind}' of {self.package}: {why}; mend {self.distribution}, or install another "
            f"version of it"
        )

    def load(self) -> Any:
        """Import it: a class, as far as its package keeps its word.

        Raises:
            PluginError: importing it failed, whatever the reason.
        """
        try:
            return self.entry_point.load()
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            raise self.wrong(f"can't be imported ({textwrap.shorten(reason, 200, placeholder=' …')})") from error


def installed() -> list[Plugin]:
    """Every component that installed packages provide and `$ASGE_ZOO_PLUGINS` lets through, by group and kind."""
    allowed = os.environ.get(SWITCH, "").strip()
    if allowed == "none":
        return []
    names = {normalized(name) for name in allowed.split(",") if name.strip()}
    every = entry_points()
    found = [
        Plugin(entry.name, group, entry.dist.name, entry.dist.version, entry)
        for group in GROUPS
        for entry in every.select(group=f"asge_zoo.{group}")
        if entry.dist is not None and (not names or normalized(entry.dist.name) in names)
    ]
    return sorted(found, key=lambda plugin: (GROUPS.index(plugin.component), plugin.kind, plugin.distribution))


def find(component: str, kind: str) -> Plugin | None:
    """The plugin that provides a kind, not imported; None if there is none.

    Raises:
        PluginError: two distributions claim it, or it is no name that a plugin may have.
    """
    claims = [plugin for plugin in installed() if (plugin.component, plugin.kind) == (component, kind)]
    if not claims:
        return None
    if len(claims) > 1:
        packages = " and ".join(plugin.package for plugin in claims)
        raise PluginError(
            f"{component} '{kind}' is claimed by {packages}; uninstall all but one, or name the one in ${SWITCH}"
        )
    if "." not in kind:
        raise claims[0].wrong(f"a plugin's kind has a prefix, as in 'acme.{kind}'")
    return claims[0]


def switch_note() -> str:
    """For where something is not found: what `$ASGE_ZOO_PLUGINS` is, if it is set."""
    allowed = os.environ.get(SWITCH, "").strip()
    return f" (${SWITCH} is '{allowed}')" if allowed else ""


def normalized(name: str) -> str:
    """A distribution's name as all its spellings come to (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
