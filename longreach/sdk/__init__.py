"""The client library: store long contexts and ask questions about them.

    >>> from longreach.sdk import Client
    >>> with Client("127.0.0.1:7400") as client:                             # doctest: +SKIP
    ...     context = client.contexts.create(path="book.txt", name="book")
    ...     print(client.generate("Who is the narrator?", context=context).text)

`AsyncClient` has the same methods as coroutines. Every failure is a longreach.errors exception.
"""

from longreach.sdk.aio import AsyncClient, AsyncTokenStream
from longreach.sdk.client import Client, TokenStream
from longreach.sdk.models import (
    Context,
    Generation,
    Member,
    Status,
    Timing,
    Token,
    Usage,
    Work,
)
from longreach.types import Budget

__all__ = [
    "AsyncClient",
    "AsyncTokenStream",
    "Budget",
    "Client",
    "Context",
    "Generation",
    "Member",
    "Status",
    "Timing",
    "Token",
    "TokenStream",
    "Usage",
    "Work",
]
