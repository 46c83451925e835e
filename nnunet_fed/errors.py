"""Errors that a user reads: one sentence that names the site or the file, and what to do about it."""

from __future__ import annotations


class FederationError(Exception):
    """Anything that a user can put right. The CLI and the trainers show its text instead of a traceback."""


class ConfigurationError(FederationError):
    """A file, an option or an environment variable is wrong."""


class BusyError(ConfigurationError):
    """Something is in use, full or not there at present: another start may succeed without anybody's doing."""


class RefusedError(FederationError):
    """The coordinator refuses what a site asks for: unknown site, other study, start without ``--c``, wrong schema."""


class WithdrawnError(RefusedError):
    """A site has withdrawn what it told while planning: all sites plan again from the beginning."""

    def __init__(self, text: str, site: str = ""):
        super().__init__(text)
        self.site = site
        """Who has; empty where it is not known."""


class UnknownCollectiveError(RefusedError):
    """The coordinator has never heard of a collective, or has lost it: nobody has contributed to it."""


class NotFiniteError(RefusedError):
    """Numbers that are not finite, where the others could do nothing with them."""


class DisagreementError(FederationError):
    """The sites differ where they must agree."""


class DeadlineError(FederationError):
    """A wait reached its deadline."""


class UnreachableError(FederationError):
    """The coordinator did not answer within the patience of the caller."""


class NoContributionError(FederationError):
    """A mean closed without a single site of positive weight (rule 4 of the protocol)."""


class RoundClosedError(FederationError):
    """The round went on without this site, which has to catch up (rule 5 of the protocol)."""


class NoRoomError(FederationError):
    """The coordinator has no room for a payload now; it may have later."""


class NotYetError(FederationError):
    """The coordinator cannot say yet what becomes of an offer; it will be able to later."""
