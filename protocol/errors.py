"""The exception tree of Palimpsest.

PalimpsestError
├── UserError                 bad input at start-up: one sentence, exit status 2
│   ├── ConfigError           an unknown key, a value out of its bounds
│   ├── DataError             a corpus, question file, index or model folder that cannot be used
│   ├── SecurityError         an address beyond loopback without keys, a key file that is missing
│   └── UnreachableError      a server that must be there and does not answer; an address in use
├── ProtocolError             a peer sent what it must not send: that message is refused, nothing else is
│   ├── MalformedMessage      truncated, foreign, or not of the schema
│   ├── MessageTooLarge       beyond the limit of its kind
│   └── IncompatibleVersion   written by another protocol version
├── RemoteError               a peer answered that it could not do what was asked
├── EngineError               an engine answered with an error, or its tokens cannot be used
│   ├── EngineRefused         the request was wrong (HTTP 4xx): never retried
│   ├── EngineUnavailable     no answer, HTTP 5xx, or aborted: may be retried on any engine
│   └── UnknownVersion        the engine cannot state the policy version of its tokens: they are refused
├── WeightsError              a weight manifest or chunk that does not verify
├── TrainingStopped           training itself cannot go on: starting again would not help (exit status 3)
│   ├── DivergenceError       update after update was skipped because its loss or gradient is not finite
│   └── DriftError            engines and learner drift apart although nothing is trained
└── StoreError                the run's store cannot be read or written
    └── StoreFullError        the disk has no room for it: nothing is admitted until there is
"""


class PalimpsestError(Exception):
    """Root of everything that this project raises on purpose."""


class UserError(PalimpsestError):
    """Bad input. The message says what, where and what to do; a command exits with status 2."""


class ConfigError(UserError):
    """A key that the config does not have, or a value out of its bounds; the path of the key is named."""


class DataError(UserError):
    """A file or folder that was given cannot be used."""


class SecurityError(UserError):
    """What was asked for would be insecure."""


class UnreachableError(UserError):
    """A server that must be there does not answer, or an address cannot be bound."""


class ProtocolError(PalimpsestError):
    """A message that does not conform. The message is refused; the connection and the state stay."""


class MalformedMessage(ProtocolError):
    """Truncated, foreign, or not of the schema."""


class MessageTooLarge(ProtocolError):
    """Beyond the limit of its kind."""


class IncompatibleVersion(ProtocolError):
    """Written by another version of the protocol."""


class RemoteError(PalimpsestError):
    """A peer answered that it could not do what was asked."""


class EngineError(PalimpsestError):
    """An engine failed, or its tokens cannot be used."""


class EngineRefused(EngineError):
    """The engine called the request wrong (HTTP 4xx). Never retried."""


class EngineUnavailable(EngineError):
    """No answer in time, HTTP 5xx, or an abort. May be retried on any engine."""


class UnknownVersion(EngineError):
    """The engine cannot state which policy version sampled its tokens."""


class WeightsError(PalimpsestError):
    """A weight manifest or chunk that does not verify."""


class TrainingStopped(PalimpsestError):
    """Training itself cannot go on, and starting the learner again would not help."""


class ExtensionError(TrainingStopped):
    """An imported advantage estimator, policy loss or correction raised an error."""


class DivergenceError(TrainingStopped):
    """So many updates in a row were not finite that training cannot go on."""


class DriftError(TrainingStopped):
    """The mismatch between engines and learner grows although nothing is trained."""


class StoreError(PalimpsestError):
    """The run's store cannot be read or written."""


class StoreFullError(StoreError):
    """The disk, or a quota on it, has no room for what the store shall write; nothing of it was written."""
