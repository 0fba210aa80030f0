"""TGI's launcher flags and variables that are no field of our configuration: other spellings, those without effect,
those refused.

A flag that would change what clients get is refused; one that tunes what works differently here is accepted, with
a warning, so that a command line written for TGI starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bros_router.config import Flag


@dataclass(frozen=True, slots=True)
class ForeignFlag:
    """A flag whose value is parsed and then not used."""

    flag: Flag
    #: `int`, `float`, `bool` (a switch) or `str`.
    type: type
    #: Why it has no effect, or why it is refused.
    reason: str
    #: Values that ask for nothing, so that they are not refused.
    neutral: tuple[object, ...] = (None, False, "")

    @property
    def name(self) -> str:
        """As an identifier: `max_waiting_tokens`."""
        return self.flag.name.replace("-", "_")


@dataclass(frozen=True, slots=True)
class ForeignVariable:
    """A variable without a flag that deployments of TGI set, and that has no effect here."""

    name: str
    #: Why.
    reason: str
    #: Values, in lower case, that ask for what is done here anyway.
    neutral: tuple[str, ...] = ()


def _foreign(name: str, kind: type, help: str, reason: str, **how: object) -> ForeignFlag:
    neutral = how.pop("neutral", (None, False, ""))
    return ForeignFlag(Flag(name=name, help=help, **how), kind, reason, neutral)  # type: ignore[arg-type]


#: Supported, though they become other fields: `sharded` and `max-input-length` are folded into `num-shard` and
#: `max-input-tokens`, `env` is no state of the server.
SHARDED: Final = Flag(
    name="sharded",
    help="true: more than one rank (see --num-shard); false: one, unless --num-shard says otherwise.",
)
MAX_INPUT_LENGTH: Final = Flag(name="max-input-length", help="Old name of --max-input-tokens.", minimum=1)
ENV: Final = Flag(name="env", short="e", has_variable=False, help="Log what the server runs on, then start.")

ACCEPTED: Final = (
    _foreign(
        "trust-remote-code",
        bool,
        "Allow code of the model's repository.",
        "Nothing of a model's repository is ever executed; models that need their own code are refused.",
    ),
    _foreign(
        "waiting-served-ratio",
        float,
        "When a prefill may interrupt decoding.",
        "Prefill and decode share each step.",
    ),
    _foreign(
        "max-waiting-tokens",
        int,
        "Steps before waiting requests are let in.",
        "Waiting requests may join at every step.",
    ),
    _foreign(
        "max-batch-total-tokens",
        int,
        "Tokens that all running requests may hold.",
        "It is what the KV cache holds: see --kv-cache-memory and --kv-slots-limit.",
        minimum=1,
    ),
    _foreign("cuda-graphs", str, "Batch sizes to capture.", "The kernels choose for themselves."),
    _foreign("disable-custom-kernels", bool, "Use no kernels of TGI's.", "Those kernels are not here: see --kernels."),
    _foreign("prometheus-port", int, "Port of the metrics.", "Metrics are on the server's own port, at /metrics."),
    _foreign(
        "shard-uds-path",
        str,
        "Prefix of the ranks' sockets.",
        "Sockets are in a private folder, in XDG_RUNTIME_DIR or TMPDIR.",
    ),
    _foreign("master-addr", str, "Address of torch.distributed.", "Ranks meet through a file."),
    _foreign("master-port", int, "Port of torch.distributed.", "Ranks meet through a file."),
    _foreign(
        "weights-cache-override",
        str,
        "Folder of weights.",
        "Weights are read where the model is: give that folder as --model-id.",
    ),
    _foreign(
        "usage-stats",
        str,
        "What is reported to the makers of TGI.",
        "Nothing is ever reported.",
        choices=("on", "off", "no-stack"),
    ),
    _foreign("ngrok-authtoken", str, "Token of the tunnel.", "There is no tunnel."),
    _foreign("ngrok-edge", str, "Edge of the tunnel.", "There is no tunnel."),
)

REFUSED: Final = (
    _foreign(
        "kv-cache-dtype",
        str,
        "Number format of the KV cache.",
        "The KV cache has the format of the model: see --dtype.",
    ),
    _foreign("ngrok", bool, "Open a tunnel.", "The server opens no tunnel: put a proxy in front."),
)

#: Variables that turn TGI's prefix cache off where they are no word for yes; the second is that of TGI 2.
PREFIX_CACHING: Final = ("PREFIX_CACHING", "USE_PREFIX_CACHING")

VARIABLES: Final = (
    ForeignVariable("ATTENTION", "The kernels choose for themselves: see --kernels."),
    ForeignVariable("MAX_IMAGE_FETCH_SIZE", "Nothing is ever fetched for a request."),
    ForeignVariable("PREFILL_CHUNKING", "Long prompts are always prefilled in several steps.", ("1", "true")),
    ForeignVariable("TGI_WIGGLE_ROOM", "See --cuda-memory-fraction and --kv-cache-memory."),
    ForeignVariable("USE_FLASH_ATTENTION", "The kernels choose for themselves: see --kernels.", ("1", "true")),
)
