# proof.py: what shows that a JOIN or a DIED comes from a side of this migration. Witnesses are joined and speak without
# TLS, so that the token itself never goes over their connections.
"""`join_key()`, `died_proof()`, and what is wrong with a JOIN that came: `wrong_join()`."""

from __future__ import annotations

import hmac

from pyvmm.errors import ProtocolError
from pyvmm.migration.frames import CHANNELS, DECISIONS, Died
from pyvmm.migration.order import DESTINATION, SOURCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.migration.connection import Connection
    from pyvmm.migration.frames import Join

SIDES = {SOURCE: 1, DESTINATION: 2}
DECISIONS_OF = {SOURCE: ("held", "offered", "given"), DESTINATION: ("none", "ready", "taken")}
WITNESSES = {CHANNELS["source-witness"]: SOURCE, CHANNELS["destination-witness"]: DESTINATION}
"""Whose witness a connection of that kind is for."""


def join_key(token: bytes, kind: int) -> bytes:
    """The `token` of a JOIN of that kind, in a migration with that token."""
    if kind not in WITNESSES:
        return token
    return hmac.digest(token, b"pyvmm witness join" + bytes([kind]), "sha256")


def wrong_join(join: Join, connection: Connection, id: bytes, token: bytes) -> str:
    """Why a JOIN that came on that connection is none of the migration with this id and token, or nothing. Whether its
    place is free is not looked at."""
    right = hmac.compare_digest(join.id, id)  # both are looked at in any case
    right &= hmac.compare_digest(join.token, join_key(token, join.kind))
    if not right:
        return "it belongs to no migration here"
    if connection.secure and join.kind in WITNESSES:
        return "a witness is joined without TLS, since that cannot be handed to it"
    if connection.plain_witness and join.kind not in WITNESSES:
        return "only a witness may do without TLS"
    return ""


def died_proof(token: bytes, side: str, decision: str) -> bytes:
    """The `proof` of DIED: only who knows the token can say that this side died having decided that."""
    return hmac.digest(token, b"pyvmm died" + bytes([SIDES[side], DECISIONS[decision]]), "sha256")


def check_died(died: Died, token: bytes, side: str) -> str:
    """The decision that DIED of that side's witness tells. Raises ProtocolError."""
    for decision in DECISIONS_OF[side]:
        if died.decision == DECISIONS[decision]:
            if hmac.compare_digest(died.proof, died_proof(token, side, decision)):
                return decision
            raise ProtocolError("DIED: its proof is wrong")
    raise ProtocolError(f"DIED: the {side} cannot have decided {died.decision}")
