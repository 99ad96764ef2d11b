from tests.api.talk import client

__all__ = ["client"]
