from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_UNSPECIFIED: _ClassVar[State]
    STATE_WAITING: _ClassVar[State]
    STATE_APPROVED: _ClassVar[State]
    STATE_OPEN: _ClassVar[State]
    STATE_CLOSED: _ClassVar[State]
    STATE_DENIED: _ClassVar[State]

class DenyReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DENY_REASON_UNSPECIFIED: _ClassVar[DenyReason]
    DENY_REASON_BUDGET: _ClassVar[DenyReason]
    DENY_REASON_CANDIDATES: _ClassVar[DenyReason]
    DENY_REASON_MEMBERS: _ClassVar[DenyReason]
    DENY_REASON_PURPOSE: _ClassVar[DenyReason]
    DENY_REASON_TIME: _ClassVar[DenyReason]
STATE_UNSPECIFIED: State
STATE_WAITING: State
STATE_APPROVED: State
STATE_OPEN: State
STATE_CLOSED: State
STATE_DENIED: State
DENY_REASON_UNSPECIFIED: DenyReason
DENY_REASON_BUDGET: DenyReason
DENY_REASON_CANDIDATES: DenyReason
DENY_REASON_MEMBERS: DenyReason
DENY_REASON_PURPOSE: DenyReason
DENY_REASON_TIME: DenyReason

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("site", "version", "paused", "running_since", "work", "epsilon_spent", "epsilon_total", "delta", "campaigns", "num_older_campaigns", "bundles_seen")
    SITE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SINCE_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    EPSILON_SPENT_FIELD_NUMBER: _ClassVar[int]
    EPSILON_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    CAMPAIGNS_FIELD_NUMBER: _ClassVar[int]
    NUM_OLDER_CAMPAIGNS_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_SEEN_FIELD_NUMBER: _ClassVar[int]
    site: str
    version: str
    paused: bool
    running_since: float
    work: str
    epsilon_spent: float
    epsilon_total: float
    delta: float
    campaigns: _containers.RepeatedCompositeFieldContainer[Campaign]
    num_older_campaigns: int
    bundles_seen: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, site: _Optional[str] = ..., version: _Optional[str] = ..., paused: _Optional[bool] = ..., running_since: _Optional[float] = ..., work: _Optional[str] = ..., epsilon_spent: _Optional[float] = ..., epsilon_total: _Optional[float] = ..., delta: _Optional[float] = ..., campaigns: _Optional[_Iterable[_Union[Campaign, _Mapping]]] = ..., num_older_campaigns: _Optional[int] = ..., bundles_seen: _Optional[_Iterable[str]] = ...) -> None: ...

class Campaign(_message.Message):
    __slots__ = ("name", "state", "plan_sha256", "operator", "epsilon_spent", "stage", "last_activity", "asked")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PLAN_SHA256_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    EPSILON_SPENT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    LAST_ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: State
    plan_sha256: str
    operator: str
    epsilon_spent: float
    stage: str
    last_activity: float
    asked: Asked
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[State, str]] = ..., plan_sha256: _Optional[str] = ..., operator: _Optional[str] = ..., epsilon_spent: _Optional[float] = ..., stage: _Optional[str] = ..., last_activity: _Optional[float] = ..., asked: _Optional[_Union[Asked, _Mapping]] = ...) -> None: ...

class Asked(_message.Message):
    __slots__ = ("plan", "epsilon", "delta", "candidates", "num_rounds", "min_sites", "num_records", "noise", "secure_sum", "max_colluding_sites")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    MIN_SITES_FIELD_NUMBER: _ClassVar[int]
    NUM_RECORDS_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    SECURE_SUM_FIELD_NUMBER: _ClassVar[int]
    MAX_COLLUDING_SITES_FIELD_NUMBER: _ClassVar[int]
    plan: str
    epsilon: float
    delta: float
    candidates: _containers.RepeatedScalarFieldContainer[str]
    num_rounds: int
    min_sites: int
    num_records: int
    noise: str
    secure_sum: bool
    max_colluding_sites: int
    def __init__(self, plan: _Optional[str] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., candidates: _Optional[_Iterable[str]] = ..., num_rounds: _Optional[int] = ..., min_sites: _Optional[int] = ..., num_records: _Optional[int] = ..., noise: _Optional[str] = ..., secure_sum: _Optional[bool] = ..., max_colluding_sites: _Optional[int] = ...) -> None: ...

class ApproveRequest(_message.Message):
    __slots__ = ("campaign", "plan_sha256", "by")
    CAMPAIGN_FIELD_NUMBER: _ClassVar[int]
    PLAN_SHA256_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    campaign: str
    plan_sha256: str
    by: str
    def __init__(self, campaign: _Optional[str] = ..., plan_sha256: _Optional[str] = ..., by: _Optional[str] = ...) -> None: ...

class DenyRequest(_message.Message):
    __slots__ = ("campaign", "reason", "by")
    CAMPAIGN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    campaign: str
    reason: DenyReason
    by: str
    def __init__(self, campaign: _Optional[str] = ..., reason: _Optional[_Union[DenyReason, str]] = ..., by: _Optional[str] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ("by",)
    BY_FIELD_NUMBER: _ClassVar[int]
    by: str
    def __init__(self, by: _Optional[str] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("by",)
    BY_FIELD_NUMBER: _ClassVar[int]
    by: str
    def __init__(self, by: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
