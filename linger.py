#!/usr/bin/env python3
"""Linger: a message queue and pub-sub server in one file, behind a plain HTTP API, kept in SQLite.

    python linger.py --port 8989

Messages are posted to *channels* and shared out among the consumers of a channel; messages that
are published on a *topic* are copied to each channel subscribed to it.  A message that was
delivered stays hidden for its visibility timeout and comes back unless it is deleted: delivery is
at least once.  What was answered with 202 or 204 is on disk.

The file reads downwards: a section uses only what stands above it.

    Limits        every bound, with its unit and its reason
    Errors        what can go wrong, with the HTTP status that says so
    Messages      the message, its parameters, and how they are read
    SQL           the schema and every statement
    Store         runs operations on SQLite, many in one transaction
    Broker        the rules of queue and pub-sub; who waits for what
    Routes        every call of the HTTP API
    Handler       bytes in, call the broker, bytes out
    Server        connections, threads, start and stop
    Command line  options, and `python linger.py`
"""

from __future__ import annotations

import _thread
import argparse
import collections
import contextlib
import email.utils
import errno
import fcntl
import functools
import http
import itertools
import json
import os
import platform
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, NoReturn, Optional, Protocol

__version__ = "2.0.0"
__all__ = [
    "Broker",
    "Conflict",
    "Full",
    "LingerError",
    "Malformed",
    "Message",
    "NotFound",
    "Server",
    "Store",
    "TooLarge",
    "Unavailable",
    "serve",
]


# ---------------------------------------------------------------------------------------------
# Limits: every bound of the file, with its unit and its reason.
# ---------------------------------------------------------------------------------------------

MIN_INTEGER = -(2**63)  # SQLite's INTEGER, and so every number of the API
MAX_INTEGER = 2**63 - 1
MAX_NAME = 255  # bytes of a channel's or topic's name in UTF-8
MAX_MESSAGE = 256_000  # bytes of a message's body, unless --max-message says otherwise; as 1.0.1
MAX_WAIT = 3_600  # seconds that a GET may ask to wait
DEFAULT_WAIT = 120  # seconds that a GET waits when it does not say; as 1.0.1
CHANNEL_TTL = 180.0  # seconds that a channel is listed after its last consumer has gone; as 1.0.1

MAX_TARGET = 16_384  # bytes of a request's target (RFC 9112 3 asks for 8,000 at least)
MAX_LINE = 8_192  # bytes of one header line
MAX_HEAD = 65_536  # bytes of a request line with all its header lines
MAX_FIELDS = 200  # header lines
KNOWN_HEADERS = 4  # sets of header lines whose meaning is remembered for a connection
MAX_PARAMETERS = 100  # fields in a query string or a form
MAX_CHUNK_LINE = 256  # bytes of a chunk's size with its extensions
FORM_EXPANSION = 3  # bytes that a percent-encoded form may need for one byte of its message
FORM_SLACK = 65_536  # bytes that a form may hold beside its message
MAX_DRAIN = 4_194_304  # bytes read and thrown away so that a client that still sends can see its
DRAIN_TIME = 2.0  # error (RFC 9112 9.6), and the seconds that this may take

READ_TIMEOUT = 30  # seconds for a whole head, and again for a whole body, however they trickle in
IDLE_TIMEOUT = 75  # seconds that a kept-alive connection may be silent, as nginx
SEND_TIMEOUT = 30  # seconds that a client may refuse to take bytes
STOP_TIMEOUT = 2.0  # seconds that requests under way get to finish when the server stops
WATCH_INTERVAL = 2.0  # seconds between looks for waiting consumers that have hung up
BUSY_TIMEOUT = 5.0  # seconds to wait for another program's lock on the database
RETRY_AFTER = 1  # seconds after which a client may try again what was answered with 503
RETRY_DELAY = 1.0  # seconds until the ticker tries again what the database refused

MAX_CONNECTIONS = 16_384  # open connections: a waiting consumer costs about 20 kB
REFUSALS = 64  # connections beyond the limit that are told so, rather than just closed
BACKLOG = 1_024  # connections that the kernel may hold until they are accepted
SWITCH_INTERVAL = 1.0  # seconds that a thread may compute while others wait
STACK_SIZE = 256 * 1024  # bytes of stack for a thread of the command-line server
SPARE_DESCRIPTORS = 64  # file descriptors kept for the database, standard streams and refusals

HEAD_ROOM = 32 * 1024 * 1024  # bytes kept free on the disk so that takes and deletes still work,
HEAD_ROOM_SHARE = 10  # but no more than one part in this many of a small disk
CACHED_STATEMENTS = 256  # prepared statements kept for each connection; more than there are
WAL_KEPT = 64 * 1024 * 1024  # bytes to which SQLite cuts its log after a checkpoint


# ---------------------------------------------------------------------------------------------
# Errors: raised anywhere below, rendered in one place (Handler), with a sentence for the client.
# ---------------------------------------------------------------------------------------------


class LingerError(Exception):
    """Something that was asked for and cannot be done; `str()` is one sentence for the client."""

    status = 500

    def __init__(self, sentence: str, status: int = 0, headers: str = "") -> None:
        """`headers` are ready-made header lines that go out with the answer."""
        super().__init__(sentence)
        self.status = status or self.status
        self.headers = headers


class Malformed(LingerError):
    """A name, number or body that is not of the form that it must have."""

    status = 400


class NotFound(LingerError):
    """There is no such thing."""

    status = 404


class Conflict(LingerError):
    """The thing is not in the state that the call needs."""

    status = 409


class TooLarge(LingerError):
    """More bytes than are taken."""

    status = 413


class Unavailable(LingerError):
    """It cannot be done now, and may be later."""

    status = 503


class Full(LingerError):
    """The channel is at its high-level mark, or the disk is full."""

    status = 507


# ---------------------------------------------------------------------------------------------
# Messages: the record that a consumer gets, the table of parameters, and the reading of names
# and numbers.  Knows nothing of where the text comes from.
# ---------------------------------------------------------------------------------------------

DEFAULT_TYPE = "text/plain"


class Message(NamedTuple):
    """A message as it is delivered."""

    id: int
    channel: str
    priority: int
    timeout: int  # seconds that this delivery stays hidden
    deliver: int  # deliveries at most; 0 without end
    delivered: int  # deliveries so far, this one included
    received: int  # seconds since it was posted
    linger: int  # seconds that it is kept; 0 for ever
    topic: str  # the topic that it was published on, or empty
    lease: int  # the number of this delivery, never used twice for this message
    type: str  # of the body, as a Content-Type
    body: bytes


class Parameter(NamedTuple):
    """A number that may be given with a message, or for all messages of a subscription."""

    name: str
    default: int
    least: int
    meaning: str


MESSAGE_PARAMETERS = (
    Parameter("priority", 0, MIN_INTEGER, "lower goes first"),
    Parameter("timeout", 30, 1, "seconds that a delivered message stays hidden"),
    Parameter("deliver", 0, 0, "deliver at most that many times; 0 without end"),
    Parameter("linger", 0, 0, "keep at most that many seconds; 0 for ever"),
)

INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
VISIBLE = re.compile("[!-~]*")


def read_integer(name: str, text: str, least: int = MIN_INTEGER, most: int = MAX_INTEGER) -> int:
    """The number that `text` gives for the parameter `name`; `Malformed` unless in its range."""
    number = int(text) if INTEGER.fullmatch(text) else None
    if number is None or not least <= number <= most:
        raise Malformed(f"{name} must be an integer from {least} to {most}")
    return number


def check_name(kind: str, name: str) -> str:
    """The name of a channel or topic (`kind`) itself; `Malformed` if it cannot be one."""
    if name.isascii() and name.isprintable() and 1 <= len(name) <= MAX_NAME:
        return name
    if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME:
        raise Malformed(f"a {kind}'s name must have 1 to {MAX_NAME} bytes in UTF-8")
    if CONTROL.search(name) or any("\ud800" <= character <= "\udfff" for character in name):
        raise Malformed(f"a {kind}'s name must be Unicode text without control characters")
    return name


def check_parameters(given: Mapping[str, int]) -> dict[str, int]:
    """All message parameters by name: those given, the others' defaults."""
    parameters = {}
    for name, default, least, _ in MESSAGE_PARAMETERS:
        parameters[name] = number = given.get(name, default)
        if not least <= number <= MAX_INTEGER:
            raise Malformed(f"{name} must be an integer from {least} to {MAX_INTEGER}")
    return parameters


# ---------------------------------------------------------------------------------------------
# SQL: the schema and every statement, a constant each.
#
# A statement sees time only as :now (seconds since 1970), decides by itself, and fits SQLite
# 3.31: no RETURNING, no clock or random function, no PRAGMA.
# ---------------------------------------------------------------------------------------------

APPLICATION_ID = 0x4C494E47  # "LING", at byte 68 of the file (sqlite.org/fileformat2.html 1.3)
SCHEMA_VERSION = 2  # `pragma user_version`; the tables of Linger 1.0.1 have 0 and count as 1

SCHEMA = (
    """
    create table config (
        key text primary key,
        value text not null
    ) without rowid
    """,
    # A message is ready (state 0) or hidden (state 1) until it is `due`; that of a ready one is
    # when it became so.  It is held from its delivery on until that delivery is undone: a worker
    # may still touch what has timed out, until the next delivery.  A take changes no column's
    # length, so that SQLite writes the row in place and does not touch the pages of a long body.
    """
    create table messages (
        id integer primary key autoincrement,
        channel text not null,
        priority integer not null,
        state integer not null,
        due real not null,
        timeout integer not null,
        deliver integer not null,
        delivered integer not null,
        lease integer not null,
        held integer not null,
        received real not null,
        linger integer not null,
        lingers_until real not null,
        topic text not null,
        type text not null,
        body blob not null
    )
    """,
    # for TAKE: the first ready message of a channel
    """
    create index ready_messages on messages (channel, priority, id)
    where state = 0
    """,
    # for SETTLE: what is due to come back
    """
    create index hidden_messages on messages (due)
    where state = 1
    """,
    # for SETTLE: whose lingering is over; not what is in flight, which stays until its timeout
    """
    create index lingering_messages on messages (lingers_until)
    where lingers_until > 0 and state = 0
    """,
    # The counts of each channel that has messages, kept by the triggers.
    """
    create table channels (
        name text primary key,
        ready integer not null,
        hidden integer not null,
        urgent integer not null,
        niced integer not null
    ) without rowid
    """,
    """
    create trigger message_added after insert on messages
    begin
        insert into channels (name, ready, hidden, urgent, niced)
        values (new.channel, new.state = 0, new.state = 1, new.priority < 0, new.priority > 0)
        on conflict (name) do update set
            ready = ready + excluded.ready,
            hidden = hidden + excluded.hidden,
            urgent = urgent + excluded.urgent,
            niced = niced + excluded.niced;
    end
    """,
    """
    create trigger message_moved after update of state on messages
    when old.state <> new.state
    begin
        update channels
        set ready = ready + old.state - new.state,
            hidden = hidden + new.state - old.state
        where name = new.channel;
    end
    """,
    """
    create trigger message_removed after delete on messages
    begin
        update channels
        set ready = ready - (old.state = 0),
            hidden = hidden - old.state,
            urgent = urgent - (old.priority < 0),
            niced = niced - (old.priority > 0)
        where name = old.channel;
        delete from channels
        where name = old.channel and ready = 0 and hidden = 0;
    end
    """,
    """
    create table subscriptions (
        topic text not null,
        channel text not null,
        priority integer not null,
        timeout integer not null,
        deliver integer not null,
        linger integer not null,
        created real not null,
        primary key (topic, channel)
    ) without rowid
    """,
    # for TOPICS_OF_CHANNEL
    """
    create index subscriptions_by_channel on subscriptions (channel, topic)
    """,
)

# From the tables of Linger 1.0.1.  Its columns have no types: a body may be text, and `show` is 0
# or the time until which a message is hidden.  Ids go on where they were.
TAKE_OVER_BEFORE = (
    "alter table config rename to config_v1",
    "alter table messages rename to messages_v1",
    "alter table subscriptions rename to subscriptions_v1",
)
TAKE_OVER_AFTER = (
    """
    insert into config (key, value)
    select key, value
    from config_v1
    where key = 'server_id'
    order by key
    """,
    """
    insert into messages (id, channel, priority, state, due, timeout, deliver, delivered, lease,
        held, received, linger, lingers_until, topic, type, body)
    select id, channel, priority, show > 0, max(show, ts), timeout, deliver, dcount, dcount,
        dcount > 0 or show > 0, ts, linger, max(purge, 0), topic, mimetype, cast(body as blob)
    from messages_v1
    order by id
    """,
    """
    insert into subscriptions (topic, channel, priority, timeout, deliver, linger, created)
    select topic, channel, priority, timeout, deliver, linger, ts
    from subscriptions_v1
    order by topic, channel
    """,
    "delete from sqlite_sequence where name = 'messages'",
    "update sqlite_sequence set name = 'messages' where name = 'messages_v1'",
    "drop table config_v1",
    "drop table messages_v1",
    "drop table subscriptions_v1",
)

GET_CONFIG = """
select value
from config
where key = :key
"""

ADD_CONFIG = """
insert into config (key, value)
values (:key, :value)
on conflict (key) do nothing
"""

SET_CONFIG = """
insert into config (key, value)
values (:key, :value)
on conflict (key) do update set value = excluded.value
"""

POST_MESSAGE = """
insert into messages (channel, priority, state, due, timeout, deliver, delivered, lease, held,
    received, linger, lingers_until, topic, type, body)
select :channel, :priority, 0, :now, :timeout, :deliver, 0, 0, 0,
    :now, :linger, :lingers_until, '', :type, :body
where :hlm = 0
    or :hlm > coalesce((select ready + hidden from channels where name = :channel), 0)
"""

PUBLISH_DROPS = """
select subscriptions.channel
from subscriptions join channels on channels.name = subscriptions.channel
where subscriptions.topic = :topic and :hlm > 0 and channels.ready + channels.hidden >= :hlm
order by subscriptions.channel
"""

PUBLISH_MESSAGE = """
insert into messages (channel, priority, state, due, timeout, deliver, delivered, lease, held,
    received, linger, lingers_until, topic, type, body)
select subscriptions.channel, priority, 0, :now, timeout, deliver, 0, 0, 0,
    :now, linger, case when linger > 0 then :now + linger else 0 end, topic, :type, :body
from subscriptions left join channels on channels.name = subscriptions.channel
where topic = :topic and (:hlm = 0 or :hlm > coalesce(ready + hidden, 0))
order by subscriptions.channel
"""

# The rows of the PUBLISH_MESSAGE just before: ids of one AUTOINCREMENT insert follow each other.
PUBLISHED = """
select channel, id, lingers_until
from messages
where id > last_insert_rowid() - changes() and id <= last_insert_rowid()
order by id
"""

TAKE_MESSAGE = """
select id, channel, priority, timeout, deliver, delivered + 1,
    max(cast(:now - received as integer), 0), linger, topic, lease + 1, type, body
from messages
where id = (
    select id
    from messages
    where channel = :channel and state = 0
    order by priority, id
    limit 1
)
"""

HIDE_TAKEN = """
update messages
set state = 1, due = :now + timeout, delivered = delivered + 1, lease = lease + 1, held = 1
where id = (
    select id
    from messages
    where channel = :channel and state = 0
    order by priority, id
    limit 1
)
"""

UNDO_TAKE = """
update messages
set state = 0, due = :now, delivered = delivered - 1, held = 0
where id = :id and lease = :lease and held = 1
"""

MESSAGE_HOLDING = """
select lease, held
from messages
where id = :id
"""

TOUCH_MESSAGE = """
update messages
set state = 1, due = :now + timeout
where id = :id and held = 1 and lease = coalesce(:lease, lease)
"""

MESSAGE_DUE = """
select due
from messages
where id = :id
"""

DELETE_MESSAGE = """
delete from messages
where id = :id
"""

DELETE_LEASED = """
delete from messages
where id = :id and lease = :lease
"""

DRAIN_READY = """
delete from messages
where channel = :channel and state = 0
"""

DRAIN_HIDDEN = """
delete from messages
where channel = :channel and state = 1
"""

# SETTLE: what has come due, in this order.  First go those that will not come back,
SETTLE_LINGERED = """
delete from messages
where lingers_until > 0 and state = 0 and lingers_until <= :now
"""

SETTLE_LINGERED_HIDDEN = """
delete from messages
where state = 1 and due <= :now and lingers_until > 0 and lingers_until <= :now
"""

SETTLE_DELIVERED = """
delete from messages
where state = 1 and due <= :now and deliver > 0 and delivered >= deliver
"""

# then the others are counted and come back,
SETTLE_COUNT = """
select channel, count(*)
from messages
where state = 1 and due <= :now
group by channel
"""

SETTLE_TIMED_OUT = """
update messages
set state = 0
where state = 1 and due <= :now
"""

# and last it is seen when the next one is due.
NEXT_HIDDEN = """
select min(due)
from messages
where state = 1
"""

NEXT_LINGERING = """
select min(lingers_until)
from messages
where lingers_until > 0 and state = 0
"""

SUBSCRIBE = """
insert into subscriptions (topic, channel, priority, timeout, deliver, linger, created)
values (:topic, :channel, :priority, :timeout, :deliver, :linger, :now)
on conflict (topic, channel) do update set
    priority = excluded.priority,
    timeout = excluded.timeout,
    deliver = excluded.deliver,
    linger = excluded.linger,
    created = excluded.created
"""

UNSUBSCRIBE = """
delete from subscriptions
where topic = :topic and channel = :channel
"""

CHANNEL_COUNTS = """
select ready, hidden
from channels
where name = :channel
"""

CHANNELS = """
select name
from channels
union
select channel
from subscriptions
"""

TOPICS = """
select distinct topic
from subscriptions
order by topic
"""

TOPICS_OF_CHANNEL = """
select topic
from subscriptions
where channel = :channel
order by topic
"""

CHANNELS_OF_TOPIC = """
select channel
from subscriptions
where topic = :topic
order by channel
"""

MESSAGE_TOTALS = """
select coalesce(sum(ready), 0), coalesce(sum(hidden), 0),
    coalesce(sum(urgent), 0), coalesce(sum(niced), 0)
from channels
"""

SUBSCRIPTION_TOTALS = """
select count(distinct topic), count(*)
from subscriptions
"""

NEWEST_MESSAGE = """
select max(id)
from messages
"""


# ---------------------------------------------------------------------------------------------
# Store: runs operations on SQLite.  Knows SQL and files; no HTTP, no consumers, no clock.
# ---------------------------------------------------------------------------------------------

MEMORY = ":memory:"
SYNC_LEVELS = ("full", "normal", "off")


class Operation:
    """A fixed list of statements that run in one transaction, all or none, and what came of it.

    `results` holds for each statement the rows of a select, else `(rows changed, last id)`.
    `committed(operation)` is called after the commit, in the order of commits, by the thread that
    committed; it must be short.  It is not called for an operation that failed.
    """

    __slots__ = ("committed", "done", "error", "parameters", "results", "statements", "turn")

    def __init__(
        self,
        statements: Sequence[str],
        parameters: Mapping[str, object],
        committed: Optional[Callable[[Operation], None]] = None,
    ) -> None:
        self.statements = statements
        self.parameters = parameters
        self.committed = committed
        self.results: list[Any] = []
        self.error: Optional[Exception] = None
        self.done = False
        self.turn = _thread.allocate_lock()  # released when it is done, or its thread's to lead
        self.turn.acquire()


class Store:
    """The database: one connection that writes, led by one thread at a time, and one that reads.

    Group commit: `submit` puts an operation on the list.  The thread whose turn it is runs all
    that are on the list in one transaction, commits, and passes the turn to the first that came
    meanwhile.  An operation that SQLite refuses leaves no trace and harms no neighbour: the
    transaction is undone, and its operations run again in one of their own each.
    """

    def __init__(self, path: str = MEMORY, sync: str = "full") -> None:
        """Opens, makes or takes over the database at `path`; `LingerError` says why it cannot.

        `sync` is how hard a commit promises: `full` is on disk, `normal` may lose the last
        commits at a power failure, `off` leaves all to the system; none loses anything when only
        the process dies.
        """
        if sync not in SYNC_LEVELS:
            raise Malformed(f"sync must be one of {', '.join(SYNC_LEVELS)}")
        self.path = path if path == MEMORY else os.path.realpath(path)
        self.sync = sync
        self.last_written = 0.0  # when the file was last changed before this start, Unix time
        self._lock = threading.Lock()  # guards the list and whether somebody leads
        self._pending: list[Operation] = []
        self._led = False
        self._reading = threading.Lock()  # one reader at a time on the reading connection
        self._files: dict[str, tuple[int, int]] = {}
        self._folder = os.path.dirname(self.path)
        self._folder_changed = -1  # when something in it was last made, moved or deleted
        self._closed = False
        with contextlib.ExitStack() as undo:
            self._lock_file = None if path == MEMORY else _lock_beside(self.path)
            if self._lock_file is not None:
                undo.callback(os.close, self._lock_file)
            try:
                self._open()
            except (sqlite3.Error, OSError) as error:
                raise Unavailable(f"cannot open the database {path}: {error}") from error
            undo.pop_all()

    def _open(self) -> None:
        """Brings the file to our schema, then opens both connections."""
        if self.path == MEMORY:
            self._writer = self._reader = self._connect()
            _create(self._writer)
            return
        with contextlib.suppress(FileNotFoundError):
            self.last_written = os.stat(self.path).st_mtime
            self.last_written = max(self.last_written, os.stat(self.path + "-wal").st_mtime)
        _prepare(self.path)
        self._writer = self._connect()
        self._reader = self._connect()
        self._reader.execute("pragma query_only = on")
        for path in (self.path, self.path + "-wal"):
            self._files[path] = _identity(path)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path,
            timeout=BUSY_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=CACHED_STATEMENTS,
        )
        connection.execute(f"pragma synchronous = {self.sync}")
        connection.execute("pragma fullfsync = on")  # macOS: through the drive's own cache as well
        connection.execute("pragma temp_store = memory")
        connection.execute(f"pragma journal_size_limit = {WAL_KEPT}")
        connection.execute("pragma journal_mode = wal").fetchall()
        connection.execute("select count(*) from sqlite_master").fetchall()  # makes -wal and -shm
        return connection

    def run(self, operation: Operation) -> list[Any]:
        """Runs an operation and returns its results; when it returns they are committed."""
        self.submit(operation)
        return self.finish(operation)

    def submit(self, operation: Operation) -> None:
        """Gives an operation its place among all others; somebody must then `finish` it."""
        with self._lock:
            self._pending.append(operation)
            if self._led:
                return
            self._led = True
        operation.turn.release()

    def finish(self, operation: Operation) -> list[Any]:
        """Waits for a submitted operation, or leads; returns its results or raises its error."""
        operation.turn.acquire()
        if not operation.done:
            self._lead()
        if operation.error is not None:
            raise operation.error
        return operation.results

    def _lead(self) -> None:
        """Commits all that is pending, then passes the turn on and tells those who wait."""
        with self._lock:
            batch, self._pending = self._pending, []
        try:
            self._commit(batch)
        finally:
            with self._lock:
                successor = self._pending[0] if self._pending else None
                self._led = successor is not None
            if successor is not None:
                successor.turn.release()
            for operation in batch:
                operation.done = True
                operation.turn.release()

    def _commit(self, batch: list[Operation]) -> None:
        """Runs operations in one transaction; if that fails, again, each in one of its own."""
        try:
            self._transact(batch)
        except Exception as error:
            self._roll_back(error)
            for operation in batch:
                try:
                    self._transact([operation])
                except Exception as refusal:
                    self._roll_back(refusal)
                    operation.error = _explain(refusal)
                else:
                    _announce([operation])
        else:
            _announce(batch)

    def _transact(self, batch: list[Operation]) -> None:
        self._check_files()
        cursor = self._writer.cursor()
        execute = cursor.execute
        execute("begin immediate")
        for operation in batch:
            parameters = operation.parameters
            operation.results = results = []
            for statement in operation.statements:
                execute(statement, parameters)
                results.append(
                    cursor.fetchall() if cursor.description else (cursor.rowcount, cursor.lastrowid)
                )
        execute("commit")

    def _roll_back(self, error: Exception) -> None:
        """Ends a failed transaction; when space is short, gives the log's back to the disk."""
        with contextlib.suppress(sqlite3.Error):
            if self._writer.in_transaction:
                self._writer.execute("rollback")
            if "full" in str(error) or "I/O" in str(error):
                self._writer.execute("pragma wal_checkpoint(truncate)").fetchall()

    def _check_files(self) -> None:
        """`Unavailable` if a file was deleted or replaced: what is written would be lost.

        One look at their folder is enough as long as nothing in it has been made or deleted.
        """
        if not self._files:
            return
        try:
            changed = os.stat(self._folder).st_mtime_ns
        except OSError:
            changed = 0
        if changed == self._folder_changed:
            return
        for path, identity in self._files.items():
            try:
                same = _identity(path) == identity
            except OSError:
                same = False
            if not same:
                raise Unavailable(
                    f"{os.path.basename(path)} was deleted or replaced while in use:"
                    " put it back, or restart the server"
                )
        self._folder_changed = changed

    def read(self, *statements: str, **parameters: object) -> list[list[Any]]:
        """The rows of selects that change nothing, all from the same moment.

        They see what was submitted before: a client may ask before it has its last answer.
        """
        if self._reader is self._writer:
            return self.run(Operation(statements, parameters))
        if self._led:
            self.run(Operation((), {}))
        try:
            with self._reading:
                self._reader.execute("begin")
                try:
                    return [self._reader.execute(s, parameters).fetchall() for s in statements]
                finally:
                    self._reader.execute("rollback")
        except sqlite3.Error as error:
            raise _explain(error) from error

    def check_room(self) -> None:
        """`Full` when so little of the disk is free that only takes and deletes may go on.

        What is in the log may still need as much again in the database.
        """
        if self.path == MEMORY:
            return
        try:
            disk = os.statvfs(self.path)
            log = os.stat(self.path + "-wal").st_size
        except OSError:
            return  # a deleted file: the transaction says so
        free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if free < log + min(HEAD_ROOM, total // HEAD_ROOM_SHARE):
            raise Full("the disk is full: messages can be taken and deleted, but none added")

    def size(self) -> int:
        """The size of the database in bytes, -1 for one in memory; as 1.0.1."""
        if self.path == MEMORY:
            return -1
        with contextlib.suppress(OSError):
            return os.stat(self.path).st_size
        return 0

    def close(self) -> None:
        """Writes the log back into the file and closes it; operations after this fail."""
        if not self._closed:
            self.run(Operation((), {}, self._close))

    def _close(self, _: Operation) -> None:
        with self._reading:
            self._closed = True
            self._reader.close()
        self._files.clear()
        with contextlib.suppress(sqlite3.Error):
            self._writer.execute("pragma wal_checkpoint(truncate)").fetchall()
        self._writer.close()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _announce(batch: Iterable[Operation]) -> None:
    """Tells of commits, in their order.  A mistake in one must not stop the others."""
    for operation in batch:
        if operation.committed is not None:
            try:
                operation.committed(operation)
            except Exception:
                traceback.print_exc()


def _explain(error: Exception) -> Exception:
    """The error that a client sees for one of SQLite's; a mistake of our own stays what it is."""
    if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
        return Full("the disk or the database is full, nothing was changed")
    if isinstance(error, sqlite3.Error):
        return Unavailable(f"the database cannot do this now, nothing was changed: {error}")
    return error


def _lock_beside(path: str) -> int:
    """Locks `<path>-lock` for as long as the descriptor returned is open.

    Not the database itself: closing any descriptor of it would drop SQLite's own locks
    (sqlite.org/howtocorrupt.html 2.2).  The lock ends with the process; the file stays.
    """
    if os.path.isdir(path):
        raise Unavailable(f"cannot open the database {path}: it is a directory")
    try:
        descriptor = os.open(path + "-lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Unavailable(f"cannot open the database {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise Unavailable(f"the database {path} is in use by another Linger") from error
    return descriptor


def _prepare(path: str) -> None:
    """Makes the file if there is none, takes over one of 1.0.1; refuses any other untouched.

    The header is read by hand: SQLite would at once write to a file with a log beside it.
    """
    header = b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        header = file.read(100)
    if not header:
        _make(path)
        return
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise Unavailable(f"{path} is not a database of Linger: choose another --dbfile")
    version, application = struct.unpack(">I4xI", header[60:72])
    if application == 0 == version and _is_version_1(path):
        _make(path, take_over=True)
    elif application != APPLICATION_ID:
        raise Unavailable(f"{path} is a database of another program: choose another --dbfile")
    elif version != SCHEMA_VERSION:
        raise Unavailable(
            f"{path} has schema {version}, and Linger {__version__} knows only"
            f" {SCHEMA_VERSION}: use the newer Linger that made it"
        )


def _make(path: str, take_over: bool = False) -> None:
    """Makes the database aside and moves it to its place whole, so that a crash leaves no half.

    A database of 1.0.1 that is there is taken over, and kept as `<path>.v1` (or `.v1.2`, ...).
    The move is on disk before the first commit is: SQLite syncs the folder with a new log.
    """
    new = path + ".new"
    with contextlib.ExitStack() as undo:
        undo.callback(_remove, new)
        _remove(new)
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection:
            if take_over:
                with contextlib.closing(sqlite3.connect(path)) as original:
                    original.backup(connection)
                _create(connection, TAKE_OVER_BEFORE, TAKE_OVER_AFTER)
                connection.execute("vacuum")
            else:
                _create(connection)
        if take_over:
            shutil.copymode(path, new)
            _keep_original(path)
        os.rename(new, path)
        undo.pop_all()


def _remove(path: str) -> None:
    for suffix in ("", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + suffix)


def _keep_original(path: str) -> None:
    """Gives the file a second name: whole at once, and before it loses its own."""
    for number in itertools.count(1):
        name = f"{path}.v1" if number == 1 else f"{path}.v1.{number}"
        if not os.path.exists(name):
            try:
                os.link(path, name)
            except OSError:  # a file system without links
                shutil.copy2(path, name)
            return
        if os.path.samefile(path, name):
            return  # kept by a start that was killed just after


def _create(
    connection: sqlite3.Connection, before: Sequence[str] = (), after: Sequence[str] = ()
) -> None:
    """Makes our tables in one transaction, between the statements of a take-over if it is one."""
    connection.execute("begin exclusive")
    for statement in (*before, *SCHEMA, *after):
        connection.execute(statement)
    connection.execute(ADD_CONFIG, {"key": "server_id", "value": uuid.uuid4().hex})
    connection.execute(f"pragma application_id = {APPLICATION_ID}")
    connection.execute(f"pragma user_version = {SCHEMA_VERSION}")
    connection.execute("commit")


def _is_version_1(path: str) -> bool:
    """Whether the file holds the tables of Linger 1.0.1; looks at nothing but the file itself."""
    uri = "file:" + urllib.parse.quote(path) + "?mode=ro&immutable=1"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        found = connection.execute("select name from sqlite_master where type = 'table'")
        return {"config", "messages", "subscriptions"} <= {name for (name,) in found}


# ---------------------------------------------------------------------------------------------
# Broker: the rules of queue and pub-sub.  Knows nothing of sockets, headers, JSON, argv.
# ---------------------------------------------------------------------------------------------

COUNTERS = (
    "msg-add",
    "msg-get",
    "delivered",
    "msg-hide",
    "msg-show",
    "msg-timeouts",
    "msg-retention",
    "msg-touch",
    "msg-delete",
    "publish",
    "channel-create",
    "channel-remove",
    "channel-drain",
    "subscription-add",
    "subscription-delete",
)

TAKE = (TAKE_MESSAGE, HIDE_TAKEN)
PUBLISH = (PUBLISH_DROPS, PUBLISH_MESSAGE, PUBLISHED)
TOUCH = (MESSAGE_HOLDING, TOUCH_MESSAGE, MESSAGE_DUE)
DRAIN = (DRAIN_READY, DRAIN_HIDDEN)
SETTLE = (
    SETTLE_LINGERED,
    SETTLE_LINGERED_HIDDEN,
    SETTLE_DELIVERED,
    SETTLE_COUNT,
    SETTLE_TIMED_OUT,
    NEXT_HIDDEN,
    NEXT_LINGERING,
)


class Clock(Protocol):
    """What the broker asks for the time; the module `time` is one, tests have another."""

    def time(self) -> float:
        """Seconds since 1970."""

    def monotonic(self) -> float:
        """Seconds that never step back."""


class Waiter:
    """A consumer that waits at a channel until it is called to take a message.

    `operation` is its take from the moment when it is called (or tries for the first time), None
    while it is parked.  All of it is guarded by the broker's lock; `called` is notified when it
    has an operation to finish, or has `ended`.
    """

    __slots__ = ("called", "channel", "ended", "operation", "ticket", "vanished")

    called: threading.Condition  # made when it is parked for the first time

    def __init__(self, channel: str, vanished: Callable[[], bool]) -> None:
        """`vanished()` tells whether the consumer has gone away; it is asked before each call."""
        self.channel = channel
        self.vanished = vanished
        self.operation: Optional[Operation] = None
        self.ticket = 0  # its place in the order of those who came; 0 before it is parked
        self.ended = False


class Broker:
    """Channels, topics and messages over a `Store`; usable from any thread, without HTTP.

    What has come due is settled before an operation runs, so that limits hold at that moment; a
    ticker does the same for those who wait.  Who waits, the counters and the time of the next
    thing due are in memory: all are changed after a commit, in the order of commits (`_lock`
    guards who waits, since waiters also leave by themselves).
    """

    def __init__(
        self, store: Store, hlm: int = 0, max_message: int = MAX_MESSAGE, clock: Clock = time
    ) -> None:
        """`hlm`: messages that a channel may hold, 0 for any number; `max_message`: in bytes."""
        self.hlm = hlm
        self.max_message = max_message
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._store = store
        self._clock = clock
        self._offset = 0.0
        self._latest = store.last_written
        self._started = clock.time()
        self._lock = threading.Lock()
        self._sooner = threading.Condition(self._lock)  # something is due earlier than it was
        self._tickets = itertools.count(1)
        self._waiting: dict[str, collections.OrderedDict[int, Waiter]] = {}
        self._deserted: collections.OrderedDict[str, float] = collections.OrderedDict()
        self._stopping = False
        self._due = 0.0
        self.id: str = store.read(GET_CONFIG, key="server_id")[0][0][0]
        self.settle()
        self._ticker = threading.Thread(target=self._tick, name="linger-ticker", daemon=True)
        self._ticker.start()

    def close(self) -> None:
        """Ends all waits and closes the store."""
        self.stop_waiting()
        self._ticker.join()
        self._store.close()

    def now(self) -> float:
        """Wall-clock seconds since 1970 that do not step back.

        When the wall clock is set back, also while the server was down, this one goes on from
        where it was: nothing hidden stays hidden for longer than its timeout.
        """
        now: float = self._clock.time() + self._offset
        if now < self._latest - 1:  # a step, not two threads that overtake each other
            self._offset += self._latest - now
            now = self._latest
        elif now > self._latest:
            self._latest = now
        return now

    # -- messages

    def post(self, channel: str, body: bytes, type: str = DEFAULT_TYPE, **parameters: int) -> int:
        """Adds a message to a channel and returns its id; when it returns the message is on disk.

        `parameters` are those of `MESSAGE_PARAMETERS`.  Raises `Malformed` for an empty body,
        `TooLarge`, and `Full` at the channel's high-level mark.
        """
        check_name("channel", channel)
        message = self._check_message(body, type, check_parameters(parameters))
        message["channel"] = channel
        linger = message["linger"]
        message["lingers_until"] = message["now"] + linger if linger else 0
        ((added, id),) = self._run((POST_MESSAGE,), message, self._posted)
        if not added:
            raise Full(f"the channel is at its high-level mark of {self.hlm} messages")
        return int(id)

    def _check_message(
        self, body: bytes, type: str, parameters: Mapping[str, int]
    ) -> dict[str, Any]:
        if not body:
            raise Malformed("the message is empty: send 1 byte or more as the body, or as msg")
        if len(body) > self.max_message:
            raise TooLarge(
                f"the message has {len(body)} bytes, and at most {self.max_message} are taken"
            )
        self._store.check_room()
        return {**parameters, "body": body, "type": type, "hlm": self.hlm, "now": self.now()}

    def _posted(self, operation: Operation) -> None:
        if operation.results[0][0]:
            message = operation.parameters
            self._added(message["channel"], message["lingers_until"])

    def _added(self, channel: Any, lingers_until: Any) -> None:
        self.counters["msg-add"] += 1
        if lingers_until:
            self._expect(lingers_until)
        if not self._call(channel, 1):
            self.counters["msg-show"] += 1

    def publish(
        self, topic: str, body: bytes, type: str = DEFAULT_TYPE
    ) -> tuple[dict[str, int], list[str]]:
        """Adds a copy of a message to each subscribed channel, in one transaction.

        Returns the copies' ids by channel, and the channels left out since they are at their
        high-level mark.
        """
        check_name("topic", topic)
        message = self._check_message(body, type, {})
        message["topic"] = topic
        dropped, _, published = self._run(PUBLISH, message, self._published)
        return {channel: id for channel, id, _ in published}, [channel for (channel,) in dropped]

    def _published(self, operation: Operation) -> None:
        for channel, _, lingers_until in operation.results[2]:
            self.counters["publish"] += 1
            self._added(channel, lingers_until)

    def get(
        self, channel: str, wait: float = 0, vanished: Callable[[], bool] = bool
    ) -> Optional[Message]:
        """Takes the next message of a channel, waiting up to `wait` seconds; None if none came.

        `vanished()` tells whether the consumer has gone away while it waited: then it is passed
        over and gets None.
        """
        waiter = self.waiter(channel, vanished)
        return self.get_for(waiter, wait)

    def waiter(self, channel: str, vanished: Callable[[], bool] = bool) -> Waiter:
        """A place for `get_for`, which another thread may `dismiss`."""
        return Waiter(check_name("channel", channel), vanished)

    def get_for(self, waiter: Waiter, wait: float) -> Optional[Message]:
        """As `get`, for a waiter made before."""
        self._settle_due()
        deadline = self._clock.monotonic() + wait
        waiter.ended = wait <= 0
        waiter.operation = self._take_for(waiter)
        self._store.submit(waiter.operation)
        while waiter.operation is not None:
            try:
                rows = self._store.finish(waiter.operation)[0]
            except LingerError:
                self._pass_on(waiter)
                raise
            if rows:
                return Message._make(rows[0])
            self._await_call(waiter, deadline)
        return None

    def _take_for(self, waiter: Waiter) -> Operation:
        now = self.now()

        def taken(operation: Operation) -> None:
            self.counters["msg-get"] += not waiter.ticket
            rows = operation.results[0]
            if not rows:
                self._park(waiter)
                return
            self.counters["delivered"] += 1
            self.counters["msg-hide"] += 1
            self._expect(now + rows[0][3])

        return Operation(TAKE, {"channel": waiter.channel, "now": now}, taken)

    def undo_take(self, message: Message) -> None:
        """Puts back a message that could not be handed over; that delivery is not counted."""
        now = self.now()

        def undone(operation: Operation) -> None:
            if operation.results[0][0]:
                self.counters["delivered"] -= 1
                self._expect(now)  # its lingering may be over
                self._call(message.channel, 1)

        parameters = {"id": message.id, "lease": message.lease, "now": now}
        self._run((UNDO_TAKE,), parameters, undone)

    def touch(self, id: int, lease: Optional[int] = None) -> None:
        """Starts the visibility timeout of a message in flight anew, from now.

        With `lease`, only if that delivery is the latest.  `NotFound`, or `Conflict` when it is
        not in flight or the lease has been overtaken.
        """

        def touched(operation: Operation) -> None:
            if operation.results[1][0]:
                self.counters["msg-touch"] += 1
                self._expect(operation.results[2][0][0])

        parameters = {"id": id, "lease": lease, "now": self.now()}
        holding, (changed, _), _ = self._run(TOUCH, parameters, touched)
        if not changed:
            _refuse(id, lease, holding, "touched")

    def delete(self, id: int, lease: Optional[int] = None) -> None:
        """Deletes a message; with `lease`, only if that delivery is the latest."""

        def deleted(operation: Operation) -> None:
            self.counters["msg-delete"] += operation.results[-1][0]

        statements = (DELETE_MESSAGE,) if lease is None else (MESSAGE_HOLDING, DELETE_LEASED)
        results = self._run(statements, {"id": id, "lease": lease}, deleted)
        if not results[-1][0]:
            _refuse(id, lease, results[0] if lease is not None else [], "deleted")

    # -- channels and topics

    def drain(self, channel: str) -> None:
        """Deletes all messages of a channel, whatever their state."""

        def drained(_: Operation) -> None:
            self.counters["channel-drain"] += 1

        self._run(DRAIN, {"channel": check_name("channel", channel)}, drained)

    def subscribe(self, channel: str, topic: str, **parameters: int) -> None:
        """Subscribes a channel to a topic: copies get `parameters`; replaces what was there."""

        def subscribed(_: Operation) -> None:
            self.counters["subscription-add"] += 1

        names = {"channel": check_name("channel", channel), "topic": check_name("topic", topic)}
        values = {**check_parameters(parameters), **names, "now": self.now()}
        self._store.check_room()
        self._run((SUBSCRIBE,), values, subscribed)

    def unsubscribe(self, channel: str, topic: str) -> None:
        """Ends a subscription; it is no error if there is none."""

        def unsubscribed(operation: Operation) -> None:
            self.counters["subscription-delete"] += operation.results[0][0]

        names = {"channel": check_name("channel", channel), "topic": check_name("topic", topic)}
        self._run((UNSUBSCRIBE,), names, unsubscribed)

    def channels(self) -> list[str]:
        """The names, sorted, of channels with messages, subscriptions, or consumers who wait or
        have been gone for less than three minutes."""
        self._settle_due()
        (rows,) = self._store.read(CHANNELS)
        with self._lock:
            self._forget_deserted()
            return sorted({name for (name,) in rows}.union(self._waiting, self._deserted))

    def topics(self, channel: Optional[str] = None) -> list[str]:
        """The sorted topics that have subscriptions: of one channel, or of all."""
        if channel is None:
            (rows,) = self._store.read(TOPICS)
        else:
            (rows,) = self._store.read(TOPICS_OF_CHANNEL, channel=check_name("channel", channel))
        return [topic for (topic,) in rows]

    def subscribers(self, topic: str) -> list[str]:
        """The sorted channels that are subscribed to a topic."""
        (rows,) = self._store.read(CHANNELS_OF_TOPIC, topic=check_name("topic", topic))
        return [channel for (channel,) in rows]

    def channel_stats(self, channel: str) -> dict[str, int]:
        """How many messages of a channel are `ready`, and how many `hidden`."""
        self._settle_due()
        (rows,) = self._store.read(CHANNEL_COUNTS, channel=check_name("channel", channel))
        ready, hidden = rows[0] if rows else (0, 0)
        return {"ready": ready, "hidden": hidden}

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what there is now."""
        self._settle_due()
        totals, subscriptions, newest = self._store.read(
            MESSAGE_TOTALS, SUBSCRIPTION_TOTALS, NEWEST_MESSAGE
        )
        ready, hidden, urgent, niced = totals[0]
        topics, subscribed = subscriptions[0]
        times = os.times()
        return {
            "start": int(self._started),
            **self.counters,
            "current-topics": topics,
            "current-subscriptions": subscribed,
            "current-channels": len(self.channels()),
            "current-messages": ready + hidden,
            "current-messages-ready": ready,
            "current-messages-hidden": hidden,
            "current-messages-urgent": urgent,
            "current-messages-niced": niced,
            "current-uptime": int(self._clock.time() - self._started),
            "db-file": self._store.path,
            "db-size": self._store.size(),
            "pid": os.getpid(),
            "rusage-utime": times.user,
            "rusage-stime": times.system,
            "version": __version__,
            "msg-max-id": newest[0][0],
            "msg-max-size": self.max_message,
            "id": self.id,
            "hostname": platform.node(),
        }

    def check_health(self) -> None:
        """Returns if a message could be stored now: it writes to the database, and syncs."""
        self._store.check_room()
        self._store.run(Operation((SET_CONFIG,), {"key": "health", "value": str(self.now())}))

    # -- what comes due

    def settle(self) -> None:
        """Lets come back, or go, what is due by now; calls those who wait for it."""
        self._store.run(Operation(SETTLE, {"now": self.now()}, self._settled))

    def _settle_due(self) -> None:
        if self._due <= self.now():
            self.settle()

    def _settled(self, operation: Operation) -> None:
        lingered, lingered_hidden, used_up, shown, _, hidden, lingering = operation.results
        back = sum(count for _, count in shown)
        self.counters["msg-timeouts"] += lingered_hidden[0] + used_up[0] + back
        self.counters["msg-retention"] += lingered[0] + lingered_hidden[0]
        self.counters["msg-delete"] += lingered[0] + lingered_hidden[0] + used_up[0]
        next_due = [moment for ((moment,),) in (hidden, lingering) if moment is not None]
        self._due = min(next_due, default=float("inf"))
        for channel, count in shown:
            self.counters["msg-show"] += count - self._call(channel, count)

    def _expect(self, moment: float) -> None:
        """Notes, after a commit, that something comes due at a moment."""
        if moment < self._due:
            with self._lock:
                self._due = moment
                self._sooner.notify()

    def _tick(self) -> None:
        """The ticker: settles what is due at the moment when it is, for those who wait."""
        while True:
            with self._lock:
                if self._stopping:
                    return
                self._forget_deserted()
                delay = self._due - self.now()
                if delay > 0:
                    self._sooner.wait(min(delay, CHANNEL_TTL))
                    continue
            try:
                self.settle()
            except LingerError as error:
                print(f"linger: what is due is tried again: {error}", file=sys.stderr)
                with self._lock:
                    self._sooner.wait_for(lambda: self._stopping, RETRY_DELAY)

    # -- who waits

    def _run(
        self,
        statements: Sequence[str],
        parameters: Mapping[str, object],
        committed: Callable[[Operation], None],
    ) -> list[Any]:
        self._settle_due()
        return self._store.run(Operation(statements, parameters, committed))

    def _park(self, waiter: Waiter) -> None:
        """Lets a waiter that found nothing wait, in its old place if it had one.

        Runs in the order of commits: a message added after the take that found nothing calls it.
        """
        with self._lock:
            waiter.operation = None
            if waiter.ended or self._stopping:
                waiter.ended = True
                return
            queue = self._waiting.get(waiter.channel)
            if queue is None:
                queue = self._waiting[waiter.channel] = collections.OrderedDict()
                if self._deserted.pop(waiter.channel, None) is None:
                    self.counters["channel-create"] += 1
            if not waiter.ticket:
                waiter.ticket = next(self._tickets)
                waiter.called = threading.Condition(self._lock)
                queue[waiter.ticket] = waiter
                return
            ahead = list(itertools.takewhile(lambda ticket: ticket < waiter.ticket, queue))
            queue[waiter.ticket] = waiter
            for ticket in (waiter.ticket, *reversed(ahead)):
                queue.move_to_end(ticket, last=False)

    def _call(self, channel: str, count: int) -> int:
        """Calls up to `count` waiters of a channel to take a message; returns how many.

        Each gets its place in the next transaction here, so that they are served in order.
        """
        if channel not in self._waiting:
            return 0
        called = 0
        with self._lock:
            queue = self._waiting.get(channel)
            while queue and called < count:
                waiter = next(iter(queue.values()))
                self._leave(waiter)
                if waiter.vanished():
                    waiter.ended = True
                else:
                    waiter.operation = self._take_for(waiter)
                    self._store.submit(waiter.operation)
                    called += 1
                waiter.called.notify()
        return called

    def _leave(self, waiter: Waiter) -> None:
        queue = self._waiting.get(waiter.channel)
        if queue and queue.pop(waiter.ticket, None) and not queue:
            del self._waiting[waiter.channel]
            self._deserted[waiter.channel] = self._clock.monotonic()

    def _await_call(self, waiter: Waiter, deadline: float) -> None:
        """Waits until a parked waiter is called and has an operation, or its wait is over."""
        with self._lock:
            while waiter.operation is None and not waiter.ended:
                remaining = deadline - self._clock.monotonic()
                if remaining <= 0:
                    self._leave(waiter)
                    waiter.ended = True
                else:
                    waiter.called.wait(remaining)

    def _pass_on(self, waiter: Waiter) -> None:
        """Calls the next one in place of a waiter whose take failed, so that all learn of it."""
        if waiter.ticket:
            self._call(waiter.channel, 1)

    def dismiss(self, waiter: Waiter) -> None:
        """Ends a wait: its `get_for` returns None, unless it was just called."""
        with self._lock:
            waiter.ended = True
            if waiter.ticket:
                self._leave(waiter)
                waiter.called.notify()

    def stop_waiting(self) -> None:
        """Ends all waits, now and from now on."""
        with self._lock:
            self._stopping = True
            for queue in list(self._waiting.values()):
                for waiter in list(queue.values()):
                    self._leave(waiter)
                    waiter.ended = True
                    waiter.called.notify()
            self._sooner.notify()

    def _forget_deserted(self) -> None:
        """Forgets the channels whose last consumer has been gone for long."""
        limit = self._clock.monotonic() - CHANNEL_TTL
        while self._deserted and next(iter(self._deserted.values())) <= limit:
            self._deserted.popitem(last=False)
            self.counters["channel-remove"] += 1


def _refuse(id: int, lease: Optional[int], holding: list[tuple[int, int]], done: str) -> NoReturn:
    """Says why a message could not be `done` with, from its row (lease, held), if there is one."""
    if not holding:
        raise NotFound(f"there is no message {id}")
    if lease is not None and holding[0][0] != lease:
        raise Conflict(f"lease {lease} of message {id} has been overtaken: it was delivered again")
    raise Conflict(f"message {id} is not in flight: only what was delivered can be {done}")


# ---------------------------------------------------------------------------------------------
# Routes: every call of the HTTP API.  Dispatch, 405 and its Allow, and the check that README.md
# names them all come from this table.
# ---------------------------------------------------------------------------------------------


class Route(NamedTuple):
    """A call: `handler` is the Handler's method for it; `safe` if it changes and takes nothing."""

    method: str
    path: str
    handler: str
    safe: bool
    summary: str


ROUTES = (
    Route("GET", "/", "welcome", True, "who answers"),
    Route("GET", "/health", "check_health", True, "whether a message could be stored now"),
    Route("GET", "/stats", "get_stats", True, "counters of the server, and what there is"),
    Route("GET", "/channels", "list_channels", True, "list channels"),
    Route("GET", "/channels/<channel>", "take_message", False, "take a message, or wait for one"),
    Route("POST", "/channels/<channel>", "post_message", False, "post a message"),
    Route("DELETE", "/channels/<channel>", "drain_channel", False, "delete all its messages"),
    Route("GET", "/channels/<channel>/stats", "get_channel_stats", True, "count its messages"),
    Route("GET", "/channels/<channel>/topics", "list_channel_topics", True, "its subscriptions"),
    Route(
        "PUT", "/channels/<channel>/topics/<topic>", "subscribe", False, "subscribe it to a topic"
    ),
    Route("DELETE", "/channels/<channel>/topics/<topic>", "unsubscribe", False, "unsubscribe it"),
    Route("GET", "/topics", "list_topics", True, "list topics"),
    Route("POST", "/topics/<topic>", "publish_message", False, "publish a message"),
    Route("GET", "/topics/<topic>/channels", "list_subscribers", True, "the channels subscribed"),
    Route("DELETE", "/messages/<id>", "delete_message", False, "delete a message"),
    Route("POST", "/messages/<id>/touch", "touch_message", False, "start its timeout anew"),
)

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT")


def _shape(parts: Sequence[str]) -> tuple[object, ...]:
    """What tells one path from another: every second part, from the first, is fixed."""
    return (len(parts), *parts[::2])


def _calls_by_path() -> dict[tuple[object, ...], dict[str, Route]]:
    calls: dict[tuple[object, ...], dict[str, Route]] = {}
    for route in ROUTES:
        calls.setdefault(_shape(route.path[1:].split("/")), {})[route.method] = route
    return calls


CALLS = _calls_by_path()


def find_calls(parts: Sequence[str]) -> dict[str, Route]:
    """The routes by method of a path, given in its parts; empty if there is no such path."""
    return CALLS.get(_shape(parts), {})


def find_route(method: str, parts: Sequence[str]) -> Route:
    """The route of a request; `LingerError` 404, 405 or 501 if there is none."""
    if method not in METHODS:
        raise LingerError(f"the method is not known: use one of {', '.join(METHODS[:6])}", 501)
    calls = find_calls(parts)
    if not calls:
        raise NotFound("there is no such path: see README.md for the calls of the API")
    route = calls.get("GET" if method == "HEAD" else method)
    if route is None or (method == "HEAD" and not route.safe):
        allowed = allowed_methods(parts)
        raise LingerError(f"this path takes {allowed}", 405, f"Allow: {allowed}\r\n")
    return route


def allowed_methods(parts: Sequence[str]) -> str:
    """The methods that a path takes, as in the header Allow (RFC 9110 10.2.1)."""
    calls = find_calls(parts)
    head = ["HEAD"] if "GET" in calls and calls["GET"].safe else []
    return ", ".join([*calls, *head, "OPTIONS"])


# ---------------------------------------------------------------------------------------------
# Handler: bytes in, call the broker, bytes out.  Reading a request is our own: strict about what
# RFC 9112 calls strict, bounded in bytes, lines and time.  What leaves the end of a request in
# doubt is answered and the connection closed, so that no byte is ever taken for another request.
# ---------------------------------------------------------------------------------------------

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")
# One pass over all header lines: no control characters (RFC 9110 5.5), hence no bare CR or LF
# (RFC 9112 2.2), no folded lines (5.2), no blank before the colon (5.1).
FIELD_LINES = re.compile(rb"(?:\r\n" + TOKEN + rb":[^\x00-\x08\x0a-\x1f\x7f]*)*")
AUTHORITY = re.compile(r"(?:[\w.~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?", re.ASCII)
BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
PART_NAME = re.compile(rb';[ \t]*name=(?:"([^"]*)"|([^\s;"]+))', re.IGNORECASE)
ONCE = frozenset(("content-length", "content-type", "host", "transfer-encoding"))
FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")

GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
TO_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
NO_STORE = "Cache-Control: no-store\r\n"
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nServer: Linger/{__version__}\r\n"
    for status in http.HTTPStatus
}


def decode_name(part: str) -> str:
    """The text of a part of a path, which is percent-encoded UTF-8."""
    if part.isascii() and "%" not in part:
        return part
    if BAD_PERCENT.search(part):
        raise Malformed("a % in the path must be followed by two hexadecimal digits")
    try:
        return urllib.parse.unquote_to_bytes(part.encode("latin-1")).decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("the path must be UTF-8, percent-encoded") from None


def encode_name(name: str) -> str:
    """A name as it may stand in a header: itself if it is visible ASCII, else percent-encoded."""
    return name if VISIBLE.fullmatch(name) else urllib.parse.quote(name, safe="")


def parse_pairs(text: bytes) -> dict[str, bytes]:
    """The fields of a query string or an urlencoded form; of two with one name the last."""
    if text.count(b"&") >= MAX_PARAMETERS:
        raise Malformed(f"at most {MAX_PARAMETERS} parameters are taken")
    fields = {}
    for pair in text.split(b"&"):
        name, _, value = pair.replace(b"+", b" ").partition(b"=")
        if name:
            key = urllib.parse.unquote_to_bytes(name).decode("utf-8", "replace")
            fields[key] = urllib.parse.unquote_to_bytes(value)
    return fields


def parse_multipart(body: bytes, content_type: str) -> dict[str, bytes]:
    """The fields of a multipart/form-data body (RFC 7578, RFC 2046 5.1), files among them."""
    found = re.search(r';[ \t]*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', content_type, re.I)
    if not found:
        raise Malformed("multipart/form-data needs a boundary of 1 to 70 characters")
    boundary = (found[1] or found[2]).encode("latin-1")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARAMETERS + 1)
    if len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise Malformed(
            f"the multipart body must end in its boundary and have at most {MAX_PARAMETERS} parts"
        )
    fields = {}
    for part in parts[1:-1]:
        head, blank, value = part.partition(b"\r\n\r\n")
        name = PART_NAME.search(head)
        if not blank or not name:
            raise Malformed("each part of a multipart body needs a Content-Disposition with a name")
        fields[(name[1] or name[2] or b"").decode("utf-8", "replace")] = value
    return fields


class Request:
    """A request whose head has been read; its body is read later, by the handler."""

    __slots__ = ("_fields", "body", "close", "headers", "method", "old", "parts", "query", "target")

    def __init__(self, method: str, target: str, headers: dict[str, str], old: bool) -> None:
        self.method = method
        self.target = target
        self.headers = headers  # by name in lower case; values of one name joined with ", "
        self.old = old  # whether it is of HTTP/1.0
        self.close = old or headers["connection"] == "close"  # whether to close after the answer
        path, _, self.query = target.partition("?")
        self.parts = path[1:].split("/")
        self.body = b""
        self._fields: Optional[tuple[dict[str, bytes], dict[str, bytes]]] = None

    def form_type(self) -> str:
        """The type of the form that the body is, or empty if it is none."""
        content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return content_type if content_type in FORM_TYPES else ""

    def fields(self) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """The fields of the query, and those of the form."""
        if self._fields is None:
            query = parse_pairs(self.query.encode("latin-1")) if self.query else {}
            form: dict[str, bytes] = {}
            if self.body:
                form_type = self.form_type()
                if form_type == FORM_TYPES[0]:
                    form = parse_pairs(self.body) if b"=" in self.body else {}
                elif form_type:
                    form = parse_multipart(self.body, self.headers["content-type"])
            self._fields = query, form
        return self._fields

    def parameter(self, name: str) -> Optional[str]:
        """A parameter's text, None if it was not given; the form's wins over the query's."""
        if not self.query and not self.body:
            return None
        query, form = self.fields()
        value = form.get(name, query.get(name))
        if value is None:
            return None
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise Malformed(f"{name} must be UTF-8, percent-encoded") from None

    def integer(
        self, name: str, least: int = MIN_INTEGER, most: int = MAX_INTEGER
    ) -> Optional[int]:
        """A parameter that is an integer; None if it was not given."""
        text = self.parameter(name)
        return None if text is None else read_integer(name, text, least, most)

    def message_parameters(self) -> dict[str, int]:
        """The message parameters that were given."""
        if not self.query and not self.form_type():
            return {}
        given = ((p.name, self.integer(p.name, p.least)) for p in MESSAGE_PARAMETERS)
        return {name: number for name, number in given if number is not None}

    def message(self) -> tuple[bytes, str]:
        """The message that is posted, and its type."""
        if not self.body:
            return self.fields()[0].get("msg", b""), DEFAULT_TYPE
        if self.form_type():
            form = self.fields()[1]
            if "msg" in form:
                return form["msg"], DEFAULT_TYPE
        return self.body, self.headers.get("content-type") or DEFAULT_TYPE


class Answer(NamedTuple):
    """What goes out.  `undo` is called if it cannot be sent."""

    status: int
    body: bytes = b""
    type: str = "application/json"
    headers: str = ""
    undo: Optional[Callable[[], None]] = None


NO_CONTENT = Answer(204)


def answer_json(value: object, status: int = 200, headers: str = "") -> Answer:
    """An answer in compact JSON with a newline at its end."""
    return Answer(status, TO_JSON(value).encode() + b"\n", headers=headers)


def answer_error(error: LingerError) -> Answer:
    """The answer for an error, the same in all cases."""
    headers = error.headers
    if error.status == 503:
        headers += f"Retry-After: {RETRY_AFTER}\r\n"
    return answer_json({"error": str(error)}, error.status, headers)


def answer_message(message: Message, undo: Callable[[], None]) -> Answer:
    """A message as it is delivered: its body, its type, and the rest in headers."""
    headers = (
        f"x-linger-msg-id: {message.id}\r\n"
        f"x-linger-channel: {encode_name(message.channel)}\r\n"
        f"x-linger-priority: {message.priority}\r\n"
        f"x-linger-timeout: {message.timeout}\r\n"
        f"x-linger-deliver: {message.deliver}\r\n"
        f"x-linger-delivered: {message.delivered}\r\n"
        f"x-linger-received: {message.received}\r\n"
        f"x-linger-linger: {message.linger}\r\n"
        f"x-linger-topic: {encode_name(message.topic)}\r\n"
        f"x-linger-lease: {message.lease}\r\n"
    )
    return Answer(200, message.body, message.type, headers, undo)


def parse_head(head: bytes, known: dict[bytes, dict[str, str]]) -> Request:
    """The request that a head (without the blank line at its end) asks for.

    `known` keeps header lines parsed before on the connection, with what they gave: most clients
    send the same few again and again.
    """
    line, _, _ = head.partition(b"\r\n")
    if len(line) > MAX_TARGET + 64:
        raise LingerError(f"the target is too long: at most {MAX_TARGET} bytes are taken", 414)
    found = REQUEST_LINE.fullmatch(line)
    if not found:
        raise Malformed("the request line must be: method, blank, target, blank, HTTP/1.1")
    method, target, major, minor = found.groups()
    if major != b"1":
        raise LingerError("only HTTP/1.1 and HTTP/1.0 are spoken here", 505)
    lines = head[len(line) :]
    headers = known.get(lines)
    if headers is None:
        headers = parse_fields(lines)
        if len(known) >= KNOWN_HEADERS:
            known.clear()
        known[lines] = headers
    old = minor == b"0"
    if old and "transfer-encoding" in headers:
        raise Malformed("HTTP/1.0 has no Transfer-Encoding")
    if not old and "host" not in headers:
        raise Malformed("a request needs a Host header")
    path = parse_target(method, target.decode("latin-1"))
    return Request(method.decode("ascii"), path, headers, old)


def parse_fields(lines: bytes) -> dict[str, str]:
    """The header fields by name in lower case; those that say where a request ends are checked.

    `connection` is always there, and `close` if that is one of its options.
    """
    if len(lines) > MAX_HEAD or lines.count(b"\r\n") > MAX_FIELDS:
        raise LingerError(f"at most {MAX_FIELDS} headers of {MAX_HEAD} bytes are taken", 431)
    if not FIELD_LINES.fullmatch(lines):
        raise Malformed(
            "a header must be `Name: value` on one line, without control characters"
            " or a blank before the colon"
        )
    headers: dict[str, str] = {}
    for line in lines.decode("latin-1").split("\r\n")[1:]:
        if len(line) > MAX_LINE:
            raise LingerError(f"a header line may have at most {MAX_LINE} bytes", 431)
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name not in headers:
            headers[name] = value
        elif name in ONCE:
            raise Malformed(f"there may be only one {name} header")
        else:
            headers[name] += ", " + value
    options = headers.get("connection", "").lower().replace("\t", " ").split(",")
    headers["connection"] = "close" if "close" in (o.strip(" ") for o in options) else ""
    if not AUTHORITY.fullmatch(headers.get("host", "localhost")):
        raise Malformed("the Host header must be a name or address, and a port if there is one")
    check_framing(headers)
    return headers


def check_framing(headers: Mapping[str, str]) -> None:
    """Refuses what leaves in doubt where the request ends (RFC 9112 6.3), and unknown codings."""
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if coding is not None:
        if length is not None:
            raise Malformed("a request has either Transfer-Encoding or Content-Length")
        if coding.lower() != "chunked":
            known = "chunked" in coding.lower()
            raise LingerError("the only transfer coding known is chunked", 400 if known else 501)
    elif length is not None:
        if not (length.isascii() and length.isdigit()):
            raise Malformed("Content-Length must be a number of bytes in decimal digits")
        if len(length) > 15:
            raise TooLarge("the Content-Length is far beyond what is taken")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise LingerError("send the body without Content-Encoding: bytes are kept as they are", 415)
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise LingerError("the only expectation known is 100-continue", 417)


def parse_target(method: bytes, target: str) -> str:
    """The path and query of a request target (RFC 9112 3.2), whose host, if any, is checked."""
    if target.startswith("/") and "#" not in target:
        return target
    if target == "*" and method == b"OPTIONS":
        return target
    scheme, _, rest = target.partition("://")
    authority, slash, path = rest.partition("/")
    if "?" in authority:
        authority, _, query = rest.partition("?")
        slash, path = "/", "?" + query
    if scheme.lower() not in ("http", "https") or not AUTHORITY.fullmatch(authority) or "#" in path:
        raise Malformed("the target must be a path that starts with /, or a URL with http://")
    return (slash or "/") + path


class Handler(BaseHTTPRequestHandler):
    """A connection: reads requests, calls the broker, writes answers, until it is closed."""

    server: Server

    # -- the connection

    def setup(self) -> None:
        self.connection: socket.socket = self.request
        self.broker = self.server.broker
        self.idle = False  # whether it waits for the first byte of a request
        self.closing = False
        self._buffer = b""  # what was received and not yet used
        self._known: dict[bytes, dict[str, str]] = {}
        self._patience = 0.0
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        patience = struct.pack("ll", SEND_TIMEOUT, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self.server.handlers.add(self)

    def handle(self) -> None:
        try:
            if self.connection in self.server.refused:
                error = Unavailable("too many connections: try again soon")
                self._send(None, answer_error(error), close=True)
                self._drain()
            while not self.closing:
                self._serve_request()
        except OSError:
            pass  # the connection is lost, or its client too slow
        except Exception:
            traceback.print_exc()

    def finish(self) -> None:
        self.server.handlers.discard(self)

    def vanished(self) -> bool:
        """Whether the client has closed its end, or the connection is broken."""
        poller = select.poll()
        poller.register(self.connection, GONE)
        return bool(poller.poll(0))

    def _serve_request(self) -> None:
        """Reads a request and answers it.  An OSError means that there is nobody to answer."""
        request = None
        try:
            head = self._read_head()
            if head is None:
                return
            started = time.monotonic()
            request = parse_head(head, self._known)
            self._read_body(request)
        except LingerError as error:
            self._send(request, answer_error(error), close=True)
            self._drain()
            return
        answer = self._answer(request)
        self._send(request, answer, request.close)
        if self.server.log_requests:
            self._log(request, answer.status, started)

    def _answer(self, request: Request) -> Answer:
        """Calls what the request asks for; every error ends here."""
        try:
            if request.method == "OPTIONS":
                return Answer(204, headers=f"Allow: {self._allowed(request)}\r\n")
            route = find_route(request.method, request.parts)
            names = [decode_name(part) for part in request.parts[1::2]]
            answer: Answer = getattr(self, route.handler)(request, *names)
            return answer if route.safe else answer._replace(headers=NO_STORE + answer.headers)
        except LingerError as error:
            return answer_error(error)
        except OSError:
            raise
        except Exception:
            traceback.print_exc()
            request.close = True
            return answer_error(LingerError("the server made a mistake, which is in its log"))

    def _allowed(self, request: Request) -> str:
        if request.target == "*":
            return ", ".join(METHODS[:6])
        if not find_calls(request.parts):
            raise NotFound("there is no such path: see README.md for the calls of the API")
        return allowed_methods(request.parts)

    # -- bytes in

    def _receive(self, deadline: float, size: int = 65_536) -> bytes:
        """What comes next; empty at the end of the stream.  TimeoutError at the deadline."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._be_patient(remaining)
        try:
            return self.connection.recv(size)
        except BlockingIOError:
            raise TimeoutError from None

    def _be_patient(self, seconds: float) -> None:
        """Sets how long the kernel waits in recv: one system call less each than a poll before."""
        if seconds != self._patience:
            self._patience = seconds
            whole = int(seconds)
            patience = struct.pack("ll", whole, max(int((seconds - whole) * 1e6), 1))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)

    def _read_head(self) -> Optional[bytes]:
        """The next head without its blank line; None when there is none and the line is closed."""
        if not self._buffer and not self._await_request():
            return None
        deadline = 0.0
        seen = 0
        while True:
            if self._buffer.startswith(b"\r\n"):
                self._buffer = self._buffer.lstrip(b"\r\n")  # RFC 9112 2.2
            end = self._buffer.find(b"\r\n\r\n", max(seen - 3, 0))
            if 0 <= end <= MAX_HEAD + MAX_TARGET:
                head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
                return head
            seen = len(self._buffer)
            self._check_head_so_far()
            deadline = deadline or time.monotonic() + self.server.read_timeout
            try:
                data = self._receive(deadline)
            except TimeoutError:
                raise LingerError("the request took too long to come", 408) from None
            if not data:
                self.closing = True
                if self._buffer:
                    raise Malformed("the request ended in its head")
                return None
            self._buffer += data

    def _await_request(self) -> bool:
        """Receives the first bytes of a request; whether any came."""
        self.idle = True
        if self.server.stopping:
            self.closing = True
            return False
        try:
            self._be_patient(IDLE_TIMEOUT)
            self._buffer = self.connection.recv(65_536)
        except BlockingIOError:
            pass
        self.idle = False
        self.closing = not self._buffer
        return not self.closing

    def _check_head_so_far(self) -> None:
        """Refuses a head that cannot become a good one, as soon as that is certain."""
        if BARE_LINE_FEED.search(self._buffer):
            raise Malformed("a line must end in CR LF")
        if self._buffer.find(b"\r\n", 0, MAX_TARGET + 64) < 0 and len(self._buffer) > MAX_TARGET:
            raise LingerError(f"the target is too long: at most {MAX_TARGET} bytes are taken", 414)
        if len(self._buffer) > MAX_HEAD:
            raise LingerError(f"the headers are too long: at most {MAX_HEAD} bytes are taken", 431)

    def _read_body(self, request: Request) -> None:
        """Reads the body whole, so that the next byte is the first of the next request."""
        headers = request.headers
        length = int(headers.get("content-length", 0))
        if not length and "transfer-encoding" not in headers:
            return
        limit = self.broker.max_message
        if request.form_type():
            limit = limit * FORM_EXPANSION + FORM_SLACK
        if length > limit:
            raise TooLarge(f"the body has {length} bytes, and at most {limit} are taken")
        deadline = time.monotonic() + self.server.read_timeout
        if "expect" in headers and not self._buffer and not request.old:
            self.connection.sendall(CONTINUE)
        try:
            if length:
                request.body = self._read_bytes(length, deadline)
            else:
                request.body = self._read_chunks(limit, deadline)
        except TimeoutError:
            raise LingerError("the body took too long to come", 408) from None

    def _read_bytes(self, length: int, deadline: float) -> bytes:
        """The next `length` bytes."""
        buffer = self._buffer
        if len(buffer) < length:
            pieces = [buffer]
            missing = length - len(buffer)
            while missing > 0:
                pieces.append(self._receive(deadline, min(missing, 1_048_576)))
                if not pieces[-1]:
                    raise Malformed("the request ended in its body")
                missing -= len(pieces[-1])
            buffer = b"".join(pieces)
        self._buffer = buffer[length:]
        return buffer[:length]

    def _read_line(self, deadline: float, limit: int = MAX_CHUNK_LINE) -> bytes:
        """The next line of a chunked body, without its CR LF."""
        while True:
            end = self._buffer.find(b"\r\n")
            if end > limit or (end < 0 and len(self._buffer) > limit):
                raise Malformed(f"a line of a chunked body may have at most {limit} bytes")
            if end >= 0:
                line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
                return line
            data = self._receive(deadline)
            if not data:
                raise Malformed("the request ended in its chunked body")
            self._buffer += data

    def _read_chunks(self, limit: int, deadline: float) -> bytes:
        """A chunked body (RFC 9112 7.1); chunk extensions and trailers are read and ignored."""
        pieces = []
        total = 0
        while True:
            found = CHUNK_LINE.fullmatch(self._read_line(deadline))
            if not found:
                raise Malformed("a chunk must start with its size in hexadecimal digits")
            size = int(found[1], 16)
            total += size
            if total > limit:
                raise TooLarge(f"the body is longer than the {limit} bytes that are taken")
            if not size:
                break
            chunk = self._read_bytes(size + 2, deadline)
            if not chunk.endswith(b"\r\n"):
                raise Malformed("a chunk must end in CR LF after as many bytes as it announced")
            pieces.append(chunk[:-2])
        trailer = b""
        while line := self._read_line(deadline, MAX_LINE):
            trailer += b"\r\n" + line
            if len(trailer) > MAX_LINE or not FIELD_LINES.fullmatch(trailer):
                raise Malformed(f"a trailer must be headers of at most {MAX_LINE} bytes")
        return b"".join(pieces)

    # -- bytes out

    def _send(self, request: Optional[Request], answer: Answer, close: bool) -> None:
        """Sends an answer in one piece; undoes what it would have told if it cannot be sent."""
        self.closing = close = close or self.server.stopping
        head = STATUS_LINES[answer.status] + self.server.date_line() + answer.headers
        if close:
            head += "Connection: close\r\n"
        if answer.status != 204:  # which has no body (RFC 9110 8.6)
            head += f"Content-Type: {answer.type}\r\nContent-Length: {len(answer.body)}\r\n"
        data = (head + "\r\n").encode("latin-1")
        if request is None or request.method != "HEAD":
            data += answer.body
        try:
            self.connection.sendall(data)
        except OSError:
            if answer.undo is not None:
                answer.undo()
            raise

    def _drain(self) -> None:
        """Lets a client that is still sending read its answer first (RFC 9112 9.6)."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + DRAIN_TIME
        left = MAX_DRAIN
        with contextlib.suppress(TimeoutError):
            while left > 0 and (data := self._receive(deadline)):
                left -= len(data)

    def _log(self, request: Request, status: int, started: float) -> None:
        milliseconds = (time.monotonic() - started) * 1000
        target = request.target.encode("ascii", "backslashreplace").decode()
        print(
            f"{self.client_address[0]} {request.method} {target} {status} {milliseconds:.1f} ms",
            file=sys.stderr,
        )

    # -- the calls, in the order of ROUTES

    def welcome(self, _: Request, *__: str) -> Answer:
        return answer_json(
            {
                "Linger": "Welcome",
                "version": __version__,
                "id": self.broker.id,
                "hostname": platform.node(),
            }
        )

    def check_health(self, _: Request) -> Answer:
        try:
            self.broker.check_health()
        except Full as error:
            raise Unavailable(str(error)) from error
        return answer_json({"healthy": True})

    def get_stats(self, _: Request) -> Answer:
        return answer_json(self.broker.stats())

    def list_channels(self, _: Request) -> Answer:
        return answer_json({"channels": self.broker.channels()})

    def take_message(self, request: Request, channel: str) -> Answer:
        wait = request.integer("wait", 0, MAX_WAIT)
        if request.parameter("nowait") is not None:
            wait = 0
        elif wait is None:
            wait = DEFAULT_WAIT
        waiter = self.broker.waiter(channel, self.vanished)
        if wait:
            self.server.watch(self.connection, waiter)
        try:
            message = self.broker.get_for(waiter, wait)
        finally:
            if wait:
                self.server.unwatch(self.connection)
        if message is None:
            return Answer(204, headers=f"x-linger-channel: {encode_name(channel)}\r\n")
        undo = functools.partial(self.broker.undo_take, message)
        if waiter.ticket and self.vanished():
            undo()
            raise ConnectionAbortedError
        return answer_message(message, undo)

    def post_message(self, request: Request, channel: str) -> Answer:
        body, content_type = request.message()
        parameters = request.message_parameters()
        return answer_json({"id": self.broker.post(channel, body, content_type, **parameters)}, 202)

    def drain_channel(self, _: Request, channel: str) -> Answer:
        self.broker.drain(channel)
        return NO_CONTENT

    def get_channel_stats(self, _: Request, channel: str) -> Answer:
        return answer_json(self.broker.channel_stats(channel))

    def list_channel_topics(self, _: Request, channel: str) -> Answer:
        return answer_json({"topics": self.broker.topics(channel)})

    def subscribe(self, request: Request, channel: str, topic: str) -> Answer:
        self.broker.subscribe(channel, topic, **request.message_parameters())
        return NO_CONTENT

    def unsubscribe(self, _: Request, channel: str, topic: str) -> Answer:
        self.broker.unsubscribe(channel, topic)
        return NO_CONTENT

    def list_topics(self, _: Request) -> Answer:
        return answer_json({"topics": self.broker.topics()})

    def publish_message(self, request: Request, topic: str) -> Answer:
        published, dropped = self.broker.publish(topic, *request.message())
        names = ",".join(urllib.parse.quote(channel, safe="") for channel in dropped)
        return answer_json(published, 202, f"x-linger-dropped: {names}\r\n" if names else "")

    def list_subscribers(self, _: Request, topic: str) -> Answer:
        return answer_json({"channels": self.broker.subscribers(topic)})

    def delete_message(self, request: Request, id: str) -> Answer:
        self.broker.delete(read_integer("id", id), request.integer("lease"))
        return NO_CONTENT

    def touch_message(self, request: Request, id: str) -> Answer:
        self.broker.touch(read_integer("id", id), request.integer("lease"))
        return NO_CONTENT


# ---------------------------------------------------------------------------------------------
# Server: connections and their threads, start and stop.
# ---------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Listens, gives each connection a thread, and stops in good order.

    `with server:` serves nothing yet; `serve_forever` does, and `serve()` does so in a thread.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = BACKLOG

    def __init__(
        self,
        broker: Broker,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        read_timeout: int = READ_TIMEOUT,
        max_connections: int = MAX_CONNECTIONS,
        log_requests: bool = False,
    ) -> None:
        """Binds the address; OSError if that cannot be done.  Port 0 picks a free one."""
        self.broker = broker
        self.read_timeout = read_timeout
        self.max_connections = max_connections
        self.log_requests = log_requests
        self.stopping = False
        self.handlers: set[Handler] = set()
        self.connections: set[socket.socket] = set()
        self.refused: set[socket.socket] = set()
        self._stopped = threading.Event()
        self._emptied = threading.Condition()
        self._date = (0, "")
        self._watched: dict[int, Waiter] = {}
        self._poller = select.poll()
        self._alarm, self._wake = os.pipe()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except BaseException:
            os.close(self._alarm)
            os.close(self._wake)
            raise
        threading.Thread(target=self._watch, name="linger-watcher", daemon=True).start()

    def server_bind(self) -> None:
        """Binds without asking the name service for our name, as HTTPServer does."""
        socketserver.TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)

    @property
    def url(self) -> str:
        """Where it listens, as `http://127.0.0.1:8989`."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}"

    # -- accepting

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Accepts connections until `shutdown`; sleeps while there are none."""
        self.socket.setblocking(False)
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        poller.register(self._alarm, select.POLLIN)
        while not self.stopping:
            poller.poll()
            while not self.stopping and self._accept():
                pass

    def _accept(self) -> bool:
        """Accepts a connection; whether there may be more."""
        try:
            connection, address = self.socket.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._stopped.wait(0.05)  # until one is closed; poll would return at once
            return False
        connection.setblocking(True)
        count = len(self.connections)
        if count >= self.max_connections + REFUSALS:
            connection.close()
            return True
        if count >= self.max_connections:
            self.refused.add(connection)
        self.connections.add(connection)
        try:
            _thread.start_new_thread(self.process_request_thread, (connection, address))
        except RuntimeError:  # the system gives no more threads
            self.shutdown_request(connection)
        return True

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection."""
        super().shutdown_request(request)
        self.connections.discard(request)
        self.refused.discard(request)
        if self.stopping:
            with self._emptied:
                self._emptied.notify()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs a mistake of ours; a connection that broke while it was set up is none."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()

    def date_line(self) -> str:
        """The header Date (RFC 9110 6.6.1), made once a second."""
        now = int(time.time())
        if now != self._date[0]:
            self._date = now, f"Date: {email.utils.formatdate(now, usegmt=True)}\r\n"
        return self._date[1]

    # -- waiting consumers that hang up

    def watch(self, connection: socket.socket, waiter: Waiter) -> None:
        """Dismisses the waiter soon after its client has hung up, until `unwatch`."""
        self._watched[connection.fileno()] = waiter
        self._poller.register(connection, GONE)

    def unwatch(self, connection: socket.socket) -> None:
        """Ends what `watch` began."""
        self._poller.unregister(connection)
        del self._watched[connection.fileno()]

    def _watch(self) -> None:
        while not self._stopped.wait(WATCH_INTERVAL):
            for descriptor, _ in self._poller.poll(0) if self._watched else ():
                waiter = self._watched.get(descriptor)
                if waiter is not None and waiter.vanished():
                    self.broker.dismiss(waiter)

    # -- stopping

    def shutdown(self) -> None:
        """Makes `serve_forever` return; fit for a signal handler."""
        self.stopping = True
        os.write(self._wake, b"!")

    def close(self) -> None:
        """Stops: waiting GETs get 204, requests under way finish, the database is closed."""
        self.shutdown()
        self._stopped.set()
        self.server_close()
        self.broker.stop_waiting()
        for handler in list(self.handlers):
            if handler.idle:
                with contextlib.suppress(OSError):
                    handler.connection.shutdown(socket.SHUT_RD)
        with self._emptied:
            self._emptied.wait_for(lambda: not self.connections, STOP_TIMEOUT)
        self.broker.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(
    host: str = "127.0.0.1", port: int = 0, dbfile: str = MEMORY, sync: str = "full", **options: Any
) -> Server:
    """A server that runs in a thread of its own, in this process, until `with` or `close` ends it.

        with linger.serve() as server:
            print(server.url)

    `options` are those of `Server`, and `hlm` and `max_message` of `Broker`.
    """
    limits = {name: options.pop(name) for name in ("hlm", "max_message") if name in options}
    broker = Broker(Store(dbfile, sync), **limits)
    try:
        server = Server(broker, host, port, **options)
    except BaseException:
        broker.close()
        raise
    threading.Thread(target=server.serve_forever, name="linger-server", daemon=True).start()
    return server


# ---------------------------------------------------------------------------------------------
# Command line: options from arguments, environment, file; `python linger.py`.
# ---------------------------------------------------------------------------------------------


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    return lambda text: read_integer("it", text, least, most)


def _sync_level(text: str) -> str:
    if text not in SYNC_LEVELS:
        raise Malformed(f"it must be one of {', '.join(SYNC_LEVELS)}")
    return text


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise Malformed("it must be true or false")
    return text.lower() in ("true", "yes", "on", "1")


class Option(NamedTuple):
    """An option: `--name VALUE`, `LINGER_NAME` in the environment, `name = value` in a file."""

    name: str
    default: Any
    read: Callable[[str], Any]
    value: str
    meaning: str


OPTIONS = (
    Option("host", "127.0.0.1", str, "ADDRESS", "address to listen on"),
    Option("port", 8989, _whole_number(0, 65_535), "PORT", "port to listen on; 0 picks one"),
    Option("dbfile", "linger.db", str, "FILE", "the database; :memory: keeps nothing"),
    Option(
        "sync",
        "full",
        _sync_level,
        "LEVEL",
        "full: on disk before the answer; normal: soon"
        " after, so that a power failure may lose the last; off: when the system likes",
    ),
    Option(
        "hlm",
        0,
        _whole_number(0, MAX_INTEGER),
        "N",
        "high-level mark: messages that a channel may hold; 0 for any number",
    ),
    Option("max-message", MAX_MESSAGE, _whole_number(1, 100_000_000), "BYTES", "longest message"),
    Option(
        "max-connections",
        MAX_CONNECTIONS,
        _whole_number(1, 1_000_000),
        "N",
        "connections at a time; more get 503",
    ),
    Option(
        "read-timeout",
        READ_TIMEOUT,
        _whole_number(1, 86_400),
        "SECONDS",
        "for a whole head to come, and again for a whole body",
    ),
    Option("log-requests", False, _truth, "", "log each request to standard error"),
    Option("debug", False, _truth, "", "the same, for the sake of Linger 1.0.1"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"linger: {message}\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="linger.py",
        description="A message queue and pub-sub server behind a plain HTTP API.",
        epilog="Each option is also LINGER_<NAME> in the environment and `name = value` in the"
        " file of --config; the command line wins, then the environment.",
        allow_abbrev=False,
    )
    for name, default, _, value, meaning in OPTIONS:
        settings: dict[str, Any] = {"metavar": value or "BOOL", "help": f"{meaning} ({default})"}
        if not value:
            settings.update(nargs="?", const="true", help=meaning)
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--config", metavar="FILE", help="read options from a file")
    parser.add_argument("--version", action="version", version=f"Linger {__version__}")
    return parser


def read_config(path: str) -> dict[str, str]:
    """Options by name from lines `name = value`; sections, quotes and # comments are allowed.

    This reads the files of Linger 1.0.1, which were Python, but runs nothing.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Malformed(f"cannot read {path}: {error}") from error
    options = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith(("#", ";", "[")):
            continue
        name, equals, value = (piece.strip() for piece in line.partition("="))
        name = name.replace("_", "-")
        if not equals or name not in {option.name for option in OPTIONS}:
            raise Malformed(f"{path}, line {number}: it must be `name = value` of an option")
        quoted = re.fullmatch(r"""(["'])(.*?)\1\s*(?:#.*)?|([^#]*?)\s*(?:\s#.*)?""", value)
        if not quoted:
            raise Malformed(f"{path}, line {number}: the quotes of the value do not match")
        options[name] = quoted[2] if quoted[1] else quoted[3]
    return options


def read_options(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """The value of each option by name; `Malformed` tells what is wrong with one."""
    given = vars(_make_parser().parse_args(arguments))
    config = given["config"] or environment.get("LINGER_CONFIG")
    in_file = read_config(config) if config else {}
    options = {}
    for name, default, read, _, _ in OPTIONS:
        key = name.replace("-", "_")
        variable = f"LINGER_{key.upper()}"
        sources = (
            (f"--{name}", given[key]),
            (variable, environment.get(variable)),
            (f"{name} in {config}", in_file.get(name)),
        )
        options[key] = default
        for source, text in sources:
            if text is not None:
                try:
                    options[key] = read(text)
                except Malformed as error:
                    raise Malformed(f"{source}: {error}") from error
                break
    return options


def _raise_descriptors(wanted: int) -> int:
    """Lets the process open as many files as `wanted` needs; how many of them it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + REFUSALS + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - REFUSALS - SPARE_DESCRIPTORS))


def _start(options: Mapping[str, Any]) -> Server:
    """The server that the options ask for, not yet accepting; `LingerError` if it cannot start."""
    store = Store(options["dbfile"], options["sync"])
    broker = Broker(store, options["hlm"], options["max_message"])
    try:
        return Server(
            broker,
            options["host"],
            options["port"],
            read_timeout=options["read_timeout"],
            max_connections=_raise_descriptors(options["max_connections"]),
            log_requests=options["log_requests"] or options["debug"],
        )
    except OSError as error:
        broker.close()
        place = f"{options['host']} port {options['port']}"
        raise Unavailable(f"cannot listen on {place}: {error.strerror or error}") from error


def _calm_threads() -> None:
    """Sets up the process for many threads, of which one can run.

    A thread that is woken could only wait for the interpreter's lock: it must not push aside the
    one that runs, nor look too often whether it is its turn (a thousand that wait, each looking
    200 times a second, keep a core busy).
    """
    threading.stack_size(STACK_SIZE)
    sys.setswitchinterval(SWITCH_INTERVAL)
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the server until SIGTERM or SIGINT; returns the exit status: 0, or 2 if it cannot."""
    _calm_threads()
    try:
        options = read_options(sys.argv[1:] if arguments is None else arguments, os.environ)
        server = _start(options)
    except LingerError as error:
        print(f"linger: {error}", file=sys.stderr)
        return 2

    def stop(number: int, _: object) -> None:
        if server.stopping:
            os._exit(128 + number)  # the second time: at once
        server.shutdown()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if options["dbfile"] == MEMORY:
        kept = "messages kept in memory only"
    else:
        kept = f"messages kept in {options['dbfile']} (sync {options['sync']})"
    print(f"Linger {__version__} listening on {server.url}, {kept}", flush=True)
    with server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
