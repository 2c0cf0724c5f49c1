"""Errors keep their class, reason and message on their way through a peer."""

import pytest

from longreach import errors, wire
from longreach.errors import LongreachError, error_for

ALL = [
    each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, LongreachError)
]


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_every_error_comes_back_from_the_wire_as_its_own_class(error):
    back = wire.error_from_proto(wire.error_to_proto(error("what and why")))
    assert type(back) is error
    assert back.message == str(back) == "what and why"
    assert back.reason == error.default_reason


def test_an_unknown_reason_keeps_the_class_of_its_code():
    back = error_for(5, "NO_SUCH_LAYER", "layer 99")
    assert type(back) is errors.NotFound
    assert back.reason == "NO_SUCH_LAYER"


def test_an_unknown_code_is_still_a_longreach_error():
    back = error_for(12, "", "not here")
    assert type(back) is LongreachError
    assert back.message == "not here"
    assert back.reason == "UNKNOWN"


def test_a_reason_does_not_override_the_code():
    assert type(error_for(8, "STALE_EPOCH", "full")) is errors.ResourceExhausted


def test_default_reasons_are_distinct():
    reasons = [error.default_reason for error in ALL]
    assert len(set(reasons)) == len(reasons)


def test_subclasses_share_the_code_of_their_kind():
    assert errors.MalformedTensor.code == errors.InvalidRequest.code == 3
    assert errors.IdentityMismatch.code == errors.FailedPrecondition.code == 9
    assert errors.CoverageTooLow.code == errors.Unavailable.code == 14
