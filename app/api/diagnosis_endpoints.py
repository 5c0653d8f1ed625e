"""The routes of `app.api.diagnosis`, as `app.api.endpoints` has all others."""

from app.api import diagnosis
from app.api.endpoints import Answer, Endpoint, Parameter
from app.api.formats import JSON, SSE
from app.core.errors import Forbidden, InvalidParams, InvalidRequest, SlowRequest, UnsupportedMedia

_KEY = "Needs an operator key; where no keys are configured at all, it is open to the server's own machine."
_EVENTS = {"x-item-schema": {"$ref": "#/components/schemas/OperationsEvent"}}

ENDPOINTS = (
    Endpoint(
        method="get",
        path="/v1/diagnosis",
        handler=diagnosis.get_diagnosis,
        summary="What is wrong with the service, why, and what helps",
        text=f"Measures against their targets, and causes with their evidence. {_KEY}",
        answers={200: Answer(text="As of now.", content={JSON: diagnosis.DiagnosisReport})},
        refusals=(Forbidden,),
        needs_operator=True,
    ),
    Endpoint(
        method="get",
        path="/v1/operations/events",
        handler=diagnosis.get_operations_events,
        summary="Follow incidents and emergencies",
        text=_KEY,
        parameters=[
            Parameter(
                name="Last-Event-ID",
                place="header",
                schema={"type": "string", "pattern": "^[0-9]{1,15}$"},
                text="Only what is newer.",
            )
        ],
        answers={200: Answer(text="Events, oldest first; the stream stays open.", content={SSE: _EVENTS})},
        refusals=(InvalidParams,),
        is_stream=True,
        needs_operator=True,
    ),
    Endpoint(
        method="post",
        path="/v1/operations/emergency",
        handler=diagnosis.set_emergency,
        summary="Declare or lift an emergency",
        text="While it lasts, the limits are tighter, poll hints longer, and no heavy scan is taken; open streams are "
        f"not touched. {_KEY}",
        takes={JSON: diagnosis.EmergencySwitch},
        answers={200: Answer(text="As it is now.", content={JSON: diagnosis.EmergencyStatus})},
        refusals=(InvalidRequest, SlowRequest, UnsupportedMedia, InvalidParams),
        needs_operator=True,
    ),
)
