"""The endpoints about the server, its users and the company: `auth.*`, `users.*` and others."""

from clearml_server.protocol import COMPANY, SERVER_API, USER, make_token
from clearml_server.state import Json, State

__all__ = ["ENDPOINTS"]

COMPANY_ENTRY = {"id": COMPANY, "name": "test"}
USER_ENTRY = {"id": USER, "name": USER, "company": COMPANY_ENTRY, "role": "user"}


def _login(state: State, data: Json) -> Json:
    token = make_token("test", int(data.get("expiration_sec") or 30 * 24 * 3600))
    state.tokens.add(token)
    return {"token": token}


def _validate_token(state: State, data: Json) -> Json:
    return {"valid": data.get("token") in state.tokens}


def _current_user(_: State, data: Json) -> Json:
    return {"user": USER_ENTRY, "getting_started": None, "settings": {"max_download_items": "1000"}}


def _all_users(_: State, data: Json) -> Json:
    return {"users": [USER_ENTRY]}


def _user_company(_: State, data: Json) -> Json:
    return {"company": COMPANY_ENTRY}


def _user_by_id(_: State, data: Json) -> Json:
    return {"user": USER_ENTRY}


def _server_info(_: State, data: Json) -> Json:
    return {
        "version": "2.3.0",
        "build": "test",
        "commit": "",
        "api_version": SERVER_API,
        "uid": "test",
    }


def _config(_: State, data: Json) -> Json:
    return {}


def _report_stats(_: State, data: Json) -> Json:
    return {"enabled": False, "enabled_version": None, "enabled_user": None}


def _organization_tags(state: State, data: Json) -> Json:
    items = [*state.tasks.values(), *state.models.values()]
    answer = {"tags": sorted({tag for item in items for tag in item["tags"]})}
    if data.get("include_system"):
        answer["system_tags"] = sorted({tag for item in items for tag in item["system_tags"]})
    return answer


def _user_companies(_: State, data: Json) -> Json:
    return {"companies": [{**COMPANY_ENTRY, "allocated": 0, "owners": []}]}


def _modes(_: State, data: Json) -> Json:
    return {"authenticated": False, "basic": {"enabled": False}, "sso": {}, "sso_providers": []}


def _ping(_: State, data: Json) -> Json:
    return {"msg": "Because it trains cats and dogs"}


ENDPOINTS = {
    "auth.login": _login,
    "auth.validate_token": _validate_token,
    "debug.ping": _ping,
    "login.supported_modes": _modes,
    "organization.get_tags": _organization_tags,
    "organization.get_user_companies": _user_companies,
    "server.config": _config,
    "server.endpoints": _config,
    "server.info": _server_info,
    "server.report_stats_option": _report_stats,
    "users.get_all": _all_users,
    "users.get_by_id": _user_by_id,
    "users.get_current_user": _current_user,
    "users.get_preferences": _config,
    "users.get_user_company": _user_company,
}
