"""The exception tree of Palimpsest.

PalimpsestError
├── UserError                 bad input at start-up: one sentence, exit status 2
│   ├── ConfigError           an unknown key, a value out of its bounds
│   ├── DataError             a corpus, question file, index, model folder or keys folder that cannot be used
│   ├── SecurityError         an address beyond loopback without keys, a key file that is missing
│   └── UnreachableError      a required server that does not answer; an address that cannot be bound
├── ProtocolError             a message that violates the protocol: only this message is refused
│   ├── MalformedMessage      truncated, not a message, or not matching the schema
│   ├── MessageTooLarge       a header or frame larger than its limit
│   └── IncompatibleVersion   of another protocol version
├── RemoteError               a peer answered a request with an error
├── EngineError               an engine answered with an error, or its tokens cannot be used
│   ├── EngineRefused         the request was wrong (HTTP 4xx): never retried
│   ├── EngineUnavailable     no answer, HTTP 5xx, or aborted: may be retried on any engine
│   └── UnknownVersion        the engine cannot state the policy version of its tokens: they are refused
├── WeightsError              a weight manifest, delta or chunk that fails verification
├── TrainingStopped           training cannot continue, and a restart would not help (exit status 3)
│   ├── ExtensionError        an imported advantage estimator, policy loss or correction raised an error
│   ├── NoProgressError       too many groups in a row failed or had no signal
│   ├── DivergenceError       too many updates in a row were skipped: their loss or gradient is not finite
│   └── DriftError            the mismatch between engines and learner grows although nothing is trained
└── StoreError                the run's store cannot be read or written
    └── StoreFullError        the disk or a quota is full: no group is admitted until there is space
"""


class PalimpsestError(Exception):
    """Base of all errors that this project defines."""


class UserError(PalimpsestError):
    """Bad input at start-up. The message has the problem, its place and the remedy. Exit status 2."""


class ConfigError(UserError):
    """An unknown config key, or a value out of its bounds. The message has the path of the key."""


class DataError(UserError):
    """An input file or folder that cannot be used."""


class SecurityError(UserError):
    """An insecure setting: an address beyond loopback without keys, a secret key that other users can read."""


class UnreachableError(UserError):
    """A required server does not answer, or an address cannot be bound."""


class ProtocolError(PalimpsestError):
    """A message that violates the protocol. It is refused; the connection and the receiver's state are kept."""


class MalformedMessage(ProtocolError):
    """The message is truncated, is not a message at all, or does not match the schema."""


class MessageTooLarge(ProtocolError):
    """A header or frame is larger than its limit."""


class IncompatibleVersion(ProtocolError):
    """The message is of another protocol version."""


class RemoteError(PalimpsestError):
    """A peer answered a request with an error."""


class EngineError(PalimpsestError):
    """An engine failed, or its tokens cannot be used."""


class EngineRefused(EngineError):
    """The engine refused the request as wrong (HTTP 4xx). Never retried."""


class EngineUnavailable(EngineError):
    """No answer in time, HTTP 5xx, or an aborted request. May be retried on any engine."""


class UnknownVersion(EngineError):
    """The engine cannot state which policy version sampled its tokens."""


class WeightsError(PalimpsestError):
    """A weight manifest, delta or chunk that fails verification."""


class TrainingStopped(PalimpsestError):
    """Training cannot continue, and restarting the learner would not help."""


class ExtensionError(TrainingStopped):
    """An imported advantage estimator, policy loss or correction raised an error."""


class NoProgressError(TrainingStopped):
    """Too many groups in a row failed, or had equal rewards, and no step was trained."""


class DivergenceError(TrainingStopped):
    """Too many updates in a row had a loss or gradient that is not finite."""


class DriftError(TrainingStopped):
    """The mismatch between engines and learner grows although nothing is trained."""


class StoreError(PalimpsestError):
    """The run's store cannot be read or written."""


class StoreFullError(StoreError):
    """The disk or a quota is full; no part of the write was stored."""
