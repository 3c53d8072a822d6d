"""Guarantees of the secure sum as functions of its module, so that mutants of it can be held to them."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np

from tests.privacy.secure_sum_cohort import (
    Attacker,
    Cohort,
    answered_round,
    changed_contexts,
    context_of,
    expected_total,
    flipped_by,
    is_refused,
    looks_uniform,
    names_of,
    opened_vector,
    progress_of,
    seeds_of,
)
from urna.privacy.mechanisms import key_stream
from urna.privacy.secure_sum import Context


def second_lists_are_refused(protocol: ModuleType, restart: bool) -> bool:
    """Whether no site ever answers two different lists of one round."""
    context = context_of(7)
    for first, second in itertools.permutations([context.names, context.names[:6], context.names[1:]], 2):
        cohort = Cohort(context, protocol)
        cohort.upload_all()
        for name in set(first) & set(second):
            cohort.roles[name].unmask(context, first)
            if restart:
                cohort.restart(name)
            if not is_refused(cohort.roles[name].unmask, cohort.context, second):
                return False
    return True


def lists_below_the_quorum_are_refused(protocol: ModuleType) -> bool:
    """Whether no site answers any list of fewer sites than the quorum's survivors; every list of cohorts of 3 to 6 sites."""
    for count in range(3, 7):
        context = context_of(count)
        cohort = Cohort(context, protocol)
        cohort.upload_all()
        kept = progress_of(cohort)
        for size in range(1, context.quorum.min_survivors):
            for alive in itertools.combinations(context.names, size):
                for name in alive:
                    cohort.roles[name].progress = dict(kept[name])
                    if not is_refused(cohort.roles[name].unmask, cohort.context, alive):
                        return False
    return True


def late_upload_is_hidden(protocol: ModuleType) -> bool:
    """Whether an upload that comes after the round opened is uniform still, with all that the server and a colluder know.

    They take off every combination of the late site's masks that the opened seeds and the colluder's keys allow.
    """
    context = context_of(5, size=40_000)
    cohort = Cohort(context, protocol)
    late, colluder = "site-004", "site-000"
    uploads = cohort.upload_all()
    attacker = Attacker(context, uploads)
    alive = context.names[:4]
    for name in alive:
        attacker.take(name, alive, cohort.roles[name].unmask(context, alive))
    seeds = attacker.seeds()
    known = [seed for item, seed in seeds.items() if item.peer == context.index[late]]
    known.append(seeds_of(cohort, colluder, uploads[colluder])[4])
    left = opened_vector(context, uploads[late])
    for at, peer in enumerate(alive):  # every edge of the late site is known by now
        seed = next(one for item, one in seeds.items() if item.dealer == at and item.peer == 4)
        if not np.array_equal(uploads[late].checks[1 + at], np.frombuffer(context.check_of([late, peer], seed), np.uint8)):
            return False
        left = left + np.frombuffer(key_stream(seed, 4 * context.size), "<u4")
    pool = [*seeds.values(), *known]
    streams = [np.frombuffer(key_stream(seed, 4 * context.size), "<u4") for seed in pool]
    return all(looks_uniform(one) for one in [left, *(left + one for one in streams), *(left - one for one in streams)])


def every_seed_depends_on_the_context(protocol: ModuleType, context: Context, changed: Context) -> bool:
    """Whether no seed of any site in one context is a seed of any site in the other; opened with real pads."""

    def seeds(of: Context) -> set[bytes]:
        found = set[bytes]()
        cohort = Cohort(of, protocol)
        for name in of.names:
            if name in names_of(4):
                found |= set(seeds_of(cohort, name, cohort.upload(name, scalars=[0] * of.num_scalars)))
        return found

    return not seeds(context) & seeds(changed)


CHANGED = changed_contexts(context_of(5))


def sums_are_exact(protocol: ModuleType) -> bool:
    """Whether rounds with and without dropouts open the plain sum."""
    for silent in ([], ["site-002"], ["site-000", "site-006"]):
        cohort = Cohort(context_of(7, num_scalars=1), protocol)
        server = cohort.round(silent)
        alive = [name for name in cohort.context.names if name not in silent]
        if not server.is_open:
            return False
        total, scalars = server.total()
        if total.tolist() != expected_total(cohort.context, alive) or scalars.tolist() != [5 * len(alive)]:
            return False
    return True


def forged_answers_never_make_a_sum(protocol: ModuleType) -> bool:
    cohort = Cohort(context_of(7), protocol)
    server = answered_round(cohort, flipped_by("site-000"), cohort.context.names[:5])
    return not server.is_open


def contexts_are_bound(protocol: ModuleType) -> bool:
    return all(every_seed_depends_on_the_context(protocol, context_of(5), one) for one in CHANGED.values())


def pads_are_bound(protocol: ModuleType) -> bool:
    """Whether the pads of one round open nothing of another with the same keys."""
    first = context_of(4)
    pads = []
    for context in (first, replace(first, round_id="c-1/round-2")):
        cohort = Cohort(context, protocol)
        cohort.upload_all()
        pads.append(cohort.roles["site-000"].unmask(context, context.names))
    return not (pads[0] == pads[1]).all(axis=1).any()


def dead_sites_are_hidden_from_one_list(protocol: ModuleType) -> bool:
    return second_lists_are_refused(protocol, restart=True)


PROPERTIES: dict[str, Callable[[ModuleType], bool]] = {
    "sums are exact": sums_are_exact,
    "late uploads are hidden": late_upload_is_hidden,
    "small lists are refused": lists_below_the_quorum_are_refused,
    "second lists are refused": dead_sites_are_hidden_from_one_list,
    "contexts are bound": contexts_are_bound,
    "pads are bound": pads_are_bound,
    "forged answers open nothing": forged_answers_never_make_a_sum,
}
