import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.client.clinic import POLICY, a_plan
from tests.client.crash_points import a_release
from urna.client.policy import Denial, Grant, Policy, admit_plan, admit_release, missing_peers
from urna.privacy.accounting import epsilon_of, gaussian, subsampled_gaussian
from urna.protocol.messages import Partition, SpentRow
from urna.protocol.plan import Plan


def a_policy(**changes: object) -> Policy:
    return Policy.model_validate(POLICY | changes)


KEY, OTHER_KEY = "ab" * 64, "cd" * 64  # public keys of operators
LICENCES = {"pixels": "Apache-2.0", "autoencoder": "CC-BY-NC-4.0", "vit": "MIT", "cnn": "MIT"}


def verdict(policy: Policy, plan: Plan, spent: tuple[SpentRow, ...] = (), operator: str = KEY) -> Grant | Denial:
    return admit_plan(policy, plan, spent, operator, LICENCES)


def spent(event: str, count: int = 1, partition: Partition = "tuning") -> SpentRow:
    return SpentRow(stage="ballot", partition=partition, event=event, count=count)


def decide(
    event: str,
    count: int = 1,
    planned: int = 1,
    here: tuple[SpentRow, ...] = (),
    earlier: tuple[SpentRow, ...] = (),
    policy: Policy | None = None,
    partition: Partition = "tuning",
) -> Denial | None:
    release = a_release("run-1/1", event=event, count=count, partition=partition)
    return admit_release(policy or a_policy(), a_plan(), release, planned, here, (*earlier, *here))


def test_a_plan_within_the_policy_is_granted_what_it_asks() -> None:
    assert verdict(a_policy(), a_plan(), ()) == Grant(epsilon=3.0, delta=1e-5)


def test_every_reason_is_given_at_once() -> None:
    plan = a_plan(
        privacy={"epsilon": 5.0, "delta": 1e-3, "max_colluding_sites": 0},
        federation={"min_sites": 2},
        candidates=[{"name": "vit"}, {"name": "cnn"}],
    )
    policy = a_policy(
        candidates=["cnn"], threshold_fraction=0.75, licences=["Apache-2.0"], operators=[OTHER_KEY], metrics=["accuracy"]
    )
    already = (spent(gaussian(1.0)),)
    denial = verdict(policy, plan, already)
    assert denial == Denial(
        (
            "budget: the plan asks epsilon 5, these records have less left",
            "budget: the plan asks epsilon 5, this site allows 4 a campaign",
            "delta: the plan asks 0.001, this site allows at most 0.0001",
            "cohort: the plan opens sums of 2 sites, this site asks for 3",
            "noise: the plan bears 0 colluders, this site asks 1",
            "threshold: 0.667 of holders open sums, 0.75 here",
            "candidates: not allowed at this site: vit",
            "licences: not allowed at this site: vit (MIT), cnn (MIT)",
            "operator: this site takes no plans of this key",
            "metrics: the plan asks for confusion, which may not leave this site",
        )
    )


def test_the_safe_choice_is_the_default() -> None:
    policy = a_policy()
    assert policy.secure_sum_required
    assert policy.threshold_fraction == 2 / 3
    assert policy.max_unproven_aborts == 3
    assert policy.operators is None  # the roster's, and no other: its signature is checked before a policy is asked


@pytest.mark.parametrize(("allowed", "fine"), [([KEY], True), ([OTHER_KEY, KEY], True), ([OTHER_KEY], False), ([], False)])
def test_only_operators_that_the_site_names_may_ask(allowed: list[str], fine: bool) -> None:
    assert isinstance(verdict(a_policy(operators=allowed), a_plan()), Grant) == fine


def test_a_candidate_of_a_licence_that_the_site_does_not_take_is_named_with_it() -> None:
    plan = a_plan()
    assert isinstance(verdict(a_policy(licences=["Apache-2.0", "CC-BY-NC-4.0"]), plan), Grant)
    assert verdict(a_policy(licences=["Apache-2.0"]), plan) == Denial(
        ("licences: not allowed at this site: autoencoder (CC-BY-NC-4.0)",)
    )


def test_a_candidate_of_unknown_licence_is_not_allowed_where_licences_are_named() -> None:
    plan = a_plan(candidates=[{"name": "new"}, {"name": "vit"}])
    assert verdict(a_policy(licences=["MIT"]), plan) == Denial(("licences: not allowed at this site: new (unknown)",))


def test_the_licence_of_a_candidate_that_is_still_to_come_is_looked_at_when_it_is_here() -> None:
    plan, policy = a_plan(candidates=[{"name": "new"}, {"name": "vit"}]), a_policy(licences=["MIT"])
    assert isinstance(admit_plan(policy, plan, (), KEY, {"vit": "MIT"}, unseen={"new"}), Grant)
    assert isinstance(admit_plan(policy, plan, (), KEY, {"vit": "Apache-2.0"}, unseen={"new"}), Denial)


def test_a_confusion_matrix_leaves_only_where_the_policy_lets_it() -> None:
    policy = a_policy(metrics=["accuracy"])
    assert isinstance(verdict(policy, a_plan()), Denial)
    assert isinstance(verdict(policy, a_plan(evaluation={"confusion": False})), Grant)
    assert isinstance(verdict(a_policy(metrics=[]), a_plan(evaluation={"confusion": False})), Denial)


@pytest.mark.parametrize(("members", "missing"), [(["a", "b", "c"], None), (["a", "c"], "b"), (["c"], "a, b"), ([], "a, b")])
def test_named_peers_must_all_be_there(members: list[str], missing: str | None) -> None:
    denial = missing_peers(a_policy(required_peers=["b", "a"]), members)
    expected = None if missing is None else Denial((f"peers: this site releases only together with {missing}",))
    assert denial == expected


def test_single_releases_are_refused_unless_the_policy_allows_them() -> None:
    plan = a_plan(privacy={"noise": "local"}, federation={"secure_sum": False})
    assert verdict(a_policy(), plan, ()) == Denial(
        ("secure sum: the plan sees single releases (federation.secure_sum = false), this site requires sums",)
    )
    assert isinstance(verdict(a_policy(secure_sum_required=False), plan, ()), Grant)


@pytest.mark.parametrize(("asked", "here", "fine"), [(2 / 3, 2 / 3, True), (0.8, 0.7, True), (0.7, 0.8, False), (1, 1, True)])
def test_a_plan_may_ask_more_holders_than_the_policy_and_not_fewer(asked: float, here: float, fine: bool) -> None:
    decision = verdict(a_policy(threshold_fraction=here), a_plan(federation={"threshold_fraction": asked}), ())
    assert isinstance(decision, Grant) == fine


def test_an_overspent_site_does_not_say_what_it_spent() -> None:
    """How much is left of these records would tell which others they were in: one person more in two data sets shows."""
    denial = verdict(a_policy(), a_plan(), (spent(gaussian(0.2)),))
    assert isinstance(denial, Denial)
    assert denial.reasons == ("budget: the plan asks epsilon 3, these records have less left",)


def test_a_plan_at_the_limits_is_granted() -> None:
    plan = a_plan(privacy={"epsilon": 4.0, "delta": 1e-4})
    assert verdict(a_policy(epsilon_total=4.0), plan, ()) == Grant(4.0, 1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epsilon_total", float("nan")),
        ("epsilon_total", float("inf")),
        ("epsilon_per_campaign", -1.0),
        ("delta", 0.0),
        ("delta", 1.0),
        ("min_cohort", 1),
        ("threshold_fraction", 0.5),
        ("threshold_fraction", 1.01),
        ("max_unproven_aborts", -1),
        ("secure_sum_required", 2),
        ("epsilon_budget", 3.0),
    ],
)
def test_a_policy_that_limits_nothing_is_no_policy(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        a_policy(**{field: value})


def test_a_stage_that_would_exceed_the_campaign_is_refused_with_the_numbers() -> None:
    event = gaussian(1.0)
    epsilon = epsilon_of([event], 1e-5)
    assert decide(event) == Denial((f"budget: this stage would bring the campaign to epsilon {epsilon:.4g} of 3",))


def test_the_operators_lower_epsilon_is_the_cap_and_the_sites_lower_one_too() -> None:
    event = gaussian(1.6)  # epsilon 2.5 at 1e-5
    assert decide(event) is None
    lower = a_policy(epsilon_per_campaign=2.0)
    assert decide(event, policy=lower) is not None


def test_two_campaigns_share_one_budget() -> None:
    event, policy = gaussian(2.0), a_policy(epsilon_total=3.0)
    assert decide(event, policy=policy) is None
    second = decide(event, earlier=(spent(event, 2),), policy=policy)
    assert second == Denial(("budget: this stage asks more than these records have left over all campaigns",))


def test_both_budgets_are_reasons_at_once() -> None:
    denial = decide(gaussian(0.4))
    assert denial is not None
    assert [reason.split(" to ")[0] for reason in denial.reasons] == [
        "budget: this stage would bring the campaign",
        "budget: this stage asks more than these records have left over all campaigns",
    ]


def test_a_stage_that_cannot_end_is_refused_at_its_first_release() -> None:
    event = gaussian(6.0)
    assert decide(event, planned=10) is None
    assert decide(event, planned=100) is not None


def test_a_planned_count_that_is_too_low_changes_nothing_in_the_end() -> None:
    event = gaussian(6.0)
    released = 0
    while decide(event, planned=1, here=(spent(event, released),) if released else ()) is None:
        released += 1
    assert epsilon_of([event] * released, 1e-5) <= 3.0 < epsilon_of([event] * (released + 1), 1e-5)


def test_the_last_release_of_many_steps_counts_all_of_them() -> None:
    event = subsampled_gaussian(0.5, 6.0)
    steps = next(n for n in range(10, 1000, 10) if epsilon_of([event] * n, 1e-5) > 2.4)  # once fits, twice does not
    assert decide(event, count=steps, planned=1) is None
    assert epsilon_of([event] * 2 * steps, 1e-5) > 3.0 > epsilon_of([event] * (steps + 1), 1e-5)
    assert decide(event, count=steps, planned=1, here=(spent(event, steps),)) is not None


def test_held_out_and_tuning_records_have_a_budget_each() -> None:
    event = gaussian(1.6)
    assert decide(event, here=(spent(event),)) is not None
    assert decide(event, here=(spent(event),), partition="heldout") is None


PLANS = st.fixed_dictionaries(
    {
        "epsilon": st.floats(0.05, 50),
        "delta": st.floats(1e-9, 5e-3),
    }
)
POLICIES = st.fixed_dictionaries(
    {
        "epsilon_total": st.floats(0.1, 20),
        "epsilon_per_campaign": st.floats(0.1, 20),
        "delta": st.floats(1e-9, 5e-3),
    }
)
RELEASES = st.lists(
    st.tuples(
        st.sampled_from(["tuning", "heldout"]),
        st.sampled_from([gaussian(8.0), gaussian(3.0), gaussian(1.2), subsampled_gaussian(0.25, 1.5)]),
        st.sampled_from([1, 5, 40]),  # events of one release
        st.sampled_from([1, 100]),  # planned, as the operator says
        st.sampled_from([0, 1]),  # campaign
    ),
    max_size=6,
)


@given(asked=PLANS, limits=POLICIES, releases=RELEASES)
@settings(max_examples=25, deadline=None)
def test_plan_cannot_raise_policy(
    asked: dict[str, float], limits: dict[str, float], releases: list[tuple[Partition, str, int, int, int]]
) -> None:
    plan, policy = a_plan(privacy=asked), a_policy(**limits)
    campaigns: tuple[list[SpentRow], list[SpentRow]] = ([], [])
    for partition, event, count, planned, campaign in releases:
        here, ever = tuple(campaigns[campaign]), (*campaigns[0], *campaigns[1])
        if isinstance(verdict(policy, plan, ever if not here else ()), Denial):
            continue
        release = a_release("run-1/1", event=event, count=count, partition=partition)
        if admit_release(policy, plan, release, planned, here, ever) is None:
            campaigns[campaign].append(spent(event, count, partition))
    for part in ("tuning", "heldout"):
        events = [[row.event for row in one if row.partition == part for _ in range(row.count)] for one in campaigns]
        assert epsilon_of(events[0] + events[1], policy.delta) <= policy.epsilon_total
        for one in events:
            assert epsilon_of(one, policy.delta) <= min(policy.epsilon_per_campaign, plan.privacy.epsilon)
