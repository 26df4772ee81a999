#!/usr/bin/env python3
"""Linger: a message queue and pub-sub server in one file, behind a plain HTTP API, kept in SQLite.

    python3 linger.py --port 8989
    python3 linger.py post jobs 'Do this!'
    python3 linger.py --help

Messages are posted to *channels* and shared out among the consumers of a channel; messages that
are published on a *topic* are copied to each channel subscribed to it.  A message that was
delivered stays hidden for its visibility timeout and comes back unless it is deleted: delivery is
at least once.  What was answered with 202 or 204 is on disk.

The file reads downwards: a section uses only what stands above it.

    Limits        every bound, with its unit and its reason
    Errors        what can go wrong, with the HTTP status that says so
    Memory        the bytes that clients may make the server keep
    Messages      the message, its parameters, and how they are read
    Schema        tables, indexes and triggers; the migration from 1.0.1
    SQL           the statements that change messages
    Directory     the SQL statements of channels and topics, inspection, clusters
    Counters      what has happened to messages, and the totals of the last hour
    Commits       operations, and the thread that commits them in groups
    Files         a database's file, its lock, and whether a log belongs to it
    Store         SQLite and its files
    Cluster       rqlite in place of SQLite: one database for several servers
    Time          broker time, which never steps; sleeps that follow it
    Patterns      topics by their words
    Live          events: what happens to messages, as it happens, for clients that listen
    State         what is in memory: waiting consumers, channels, timers
    Operations    a class for each kind of call: statements, effects, result
    Changes       operations that touch, release, reject, change, move or drain messages
    Management    channels and topics, bulk work, and what there is
    Watch         what other servers of a cluster change, and how this one learns of it
    Calls         request and reply, and waiting until a channel is drained
    Schedules     messages that are posted at certain times
    Topics        subscriptions to patterns, publications that are kept
    Broker        the public calls of queue and pub-sub
    Access        tokens and their rights; which web pages may send requests
    Routes        every endpoint of the HTTP API
    Requests      from bytes to requests, without sockets
    Responses     from messages and results to bytes
    Metrics       the page for Prometheus, from a table
    Page style    the dashboard's style sheet,
    Page script   its calls and the parts of its views,
    Page views    and what it shows
    Page          the dashboard as a document, and the policy that a browser enforces on it
    OpenAPI       the description of the API, from the tables
    API           the endpoints: call the broker
    Connections   a thread each: receives, waits, replies
    Server        accepts, limits, starts and stops
    Encoding      values of Python as requests, responses as messages
    Transport     connections of a client, retries
    Loops         take messages for a client, keep them in flight, acknowledge them
    Client        the HTTP API as methods
    Options       the server's options in one table; a server as a process
    Commands      what each command does, and how it writes the result
    Worker        `linger work`: a process for each message
    Bench         `linger bench`: measures a server
    Command line  the table of commands; `main`

Where to look for the rules that matter most:

    a lease is checked           `IS_DELIVERY` in SQL, `refuse_lease` in Operations
    a message is taken           `Take` in Operations
    a consumer waits, is woken   `WaitingList` in State, `State.wake` in Operations
    operations share a commit    `Committer` in Commits
    timeouts and delays end      `ProcessDue` in Operations, `Timers` in State
    nothing is done twice        `Cluster.transact` in Cluster, `TAKE_TURN` in Directory
    an event reaches a stream    `LOOK_UPS` and `Live` in Live, `EventStream` in Responses
    a request is read            `RequestReader` in Requests (`_read_chunks`: a chunked body)
    a token is looked up         `Access.identify` in Access
    a reply waits for a commit   `ReplySlot` in Connections, and the comment above it
"""

from __future__ import annotations

import importlib.util
import os
import sys

if __name__ == "__main__":

    def hand_over() -> None:
        """Goes on in a new interpreter that runs this file compiled, if it can.

        One that compiles a script keeps the syntax tree to the end, 35 MB.  The compiled file lies
        in `__pycache__` with a hash of its source (PEP 552), and is made anew after an edit.
        """
        original = getattr(sys, "orig_argv", [])  # since Python 3.10
        flags = original[1 : -len(sys.argv)]
        is_script = original[-len(sys.argv) :] == sys.argv and not {"-c", "-m", "-i"} & {*flags}
        if not is_script or sys.dont_write_bytecode or sys.gettrace():
            return
        source, header = os.path.realpath(__file__), b""
        try:
            compiled = importlib.util.cache_from_source(source + ".py")
            with open(source, "rb") as file:
                mark = importlib.util.source_hash(file.read())
            if os.path.exists(compiled):
                with open(compiled, "rb") as file:
                    header = file.read(16)
            if header != importlib.util.MAGIC_NUMBER + b"\3\0\0\0" + mark:
                import py_compile  # which is not needed once the file is there

                mode = py_compile.PycInvalidationMode.CHECKED_HASH
                py_compile.compile(source, compiled, doraise=True, invalidation_mode=mode)
            os.execv(sys.executable, [sys.executable, *flags, compiled, *sys.argv[1:]])
        except (NotImplementedError, OSError):
            return  # there is no such cache, or nothing can be written beside this file

    if __file__.endswith(".pyc"):
        __file__ = hand_over.__code__.co_filename
    elif os.name == "posix" and (sys.argv[1:2] or ["serve"])[0].startswith(("serve", "-")):
        hand_over()

import _thread
import argparse
import base64
import binascii
import bisect
import codecs
import collections
import contextlib
import datetime
import difflib
import email.utils
import errno
import fnmatch
import functools
import gc
import hashlib
import heapq
import http
import http.client
import io
import ipaddress
import itertools
import json
import math
import operator
import queue
import re
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import subprocess
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import urllib.parse
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    NamedTuple,
    NoReturn,
    Optional,
    Protocol,
    TextIO,
    TypeVar,
    Union,
    cast,
    get_type_hints,
)

if TYPE_CHECKING:
    import logging
    from typing import TypedDict, Unpack  # Unpack: for a type checker that reads Python 3.11

try:
    import fcntl
    import resource
except ImportError:  # Windows, where only the client works
    IS_POSIX = False
else:
    IS_POSIX = True

__version__ = "2.0.0"
__all__ = [
    "Access",
    "AccessDenied",
    "BadRequest",
    "Broker",
    "Client",
    "Conflict",
    "Full",
    "LingerError",
    "Message",
    "NotFound",
    "OutcomeUnknown",
    "PostResult",
    "Server",
    "Store",
    "TooLarge",
    "Unavailable",
    "open_store",
    "serve",
]


LOADED_AT = time.time()  # when this program was read, in Unix time


# ---------------------------------------------------------------------------------------------
# Limits: every bound in this file, with its unit and its reason.
# ---------------------------------------------------------------------------------------------

# Messages and channels
MIN_INTEGER = -(2**63)  # range of SQLite's INTEGER, and so of every number in the API
MAX_INTEGER = 2**63 - 1
MAX_NAME = 255  # longest name of a channel or topic, bytes of UTF-8
MAX_MESSAGE = 256_000  # default of --max-message, bytes; as Linger 1.0.1
MAX_MESSAGE_OPTION = 100_000_000  # largest --max-message, bytes
MAX_BATCH = 1_000  # messages per batch
LISTED = 50  # default of `n` of a listing: messages or publications
MAX_SORTED = 10_000  # messages whose ids a listing sorts, since no index of a channel is by id
MAX_BATCH_BYTES = 8_000_000  # size of a batch request, bytes
MAX_BATCH_LINES = 4_000  # lines of a batch in NDJSON, empty lines included
MAX_JSON_COMMAS = 32_000  # commas in a JSON batch: 32 fields per message
MAX_JSON_STRUCTURE = 2_000_000  # characters in a JSON batch outside of its strings
MAX_OWN_HEADERS = 16  # own headers of a message, and
MAX_OWN_BYTES = 1_024  # their names and values, bytes: they are part of the head of each delivery
MAX_REASON = 4_096  # reason for a release or rejection, bytes
PREVIEW_BYTES = 1_024  # part of a body that a listing shows, bytes
MAX_CHANNELS_AT_ONCE = 100  # channels in one GET
MAX_BACKOFF = 32  # steps of a message's backoff
BACKOFF_WIDTH = 10  # characters per stored step: a fixed width lets SQL find step n
MAX_WAIT = 3_600  # longest wait of a GET, a call, or until a channel is drained, seconds
CALL_WAIT = 30  # wait of a call without `wait`, seconds
REPLY_TTL = 60  # time for which a reply is kept, seconds: its caller takes it at once
KEPT_REPLY = 1_024  # longest body of a reply that is kept when its caller has it, bytes
LOOK_PAUSE = 0.05  # seconds between two looks of a call that waits for rows, such as a reply,
LOOKS_AT_ONCE = 20  # while so many calls wait or fewer; with more of them, each looks less often
LONGEST_PAUSE = 0.5  # longest time between two looks of one, seconds: it must notice a stop
DEFAULT_WAIT = 120  # wait of a GET without `wait`, seconds; as Linger 1.0.1
CHANNEL_TTL = 180.0  # time that a channel stays listed without consumers, seconds; as 1.0.1
MAX_IDLE_CHANNELS = 10_000  # channels listed for that reason only
MAX_CHANNELS = 100_000  # default of --max-channels: their names are kept in memory
PIECE_ROWS = 1_000  # rows that a piece of bulk work touches in one transaction,
PIECE_TIME = 0.01  # and seconds that it should take: other calls wait meanwhile
LARGE_COUNT = 10  # messages of a take whose response is made by a thread of its own, as one of
# more than SMALL_AMOUNT bytes is: the committer has no time for it
MAX_EXPIRED = 1_000  # expired messages that a take passes over at a time
FIRST_PIECE = 64  # rows of the first piece: their bodies may be large
MAX_DUE_CHANNELS = 64  # channels whose due messages are processed in one transaction
MAX_LISTED_CHANNELS = 1_000  # channels that a listing with `n` describes
CHANNEL_PAGE = 1_000  # channels that a listing reads at a time
MAX_SCHEDULES = 1_000  # all are read when one is due
MAX_CRON = 500  # characters of a cron expression
MAX_EVERY = 31_622_400  # seconds of a year between two posts of a schedule
HEALTH_INTERVAL = 1.0  # shortest time between two writes of health checks, seconds
RECOUNT_INTERVAL = 1.0  # shortest time between two counts of the channels, seconds
MAX_SUBSCRIBERS = 10_000  # channels per topic: each publication is copied to all of them
MAX_KEPT = 10_000  # publications that a topic with `keep` keeps
MAX_KEEPING_TOPICS = 1_000  # topics that keep publications: all are looked at once a minute
TRIM_ROWS = 10  # publications that one more may remove: it is one more usually
COMMIT_TIME = 60.0  # how far times of publications may be out of the order of ids, seconds
TRIM_INTERVAL = 60.0  # longest time between two looks for publications kept for long enough, s
REPLAY_PAGE = 16  # kept publications that a stream reads at a time: each may have MAX_EVENT_BODY;
# what it does not send at once it reads again
MAX_TOPIC_PATTERNS = 10_000  # subscriptions to patterns, whose patterns are kept in memory
JSON_EXPANSION = 6  # bytes of JSON for a byte of a body: control characters
MAX_BATCH_COPIES = 100_000  # copies that one published batch may create,
MAX_BATCH_COPY_BYTES = 256_000_000  # and their bytes: other calls wait while they are written

# Requests
MAX_TARGET = 16_384  # longest request target, bytes (RFC 9112 3 asks for 8,000 at least)
MAX_REQUEST_LINE = MAX_TARGET + 64  # the target with method and version, bytes
MAX_LINE = 8_192  # longest header line, bytes
MAX_HEAD = 65_536  # all header lines together, bytes
MAX_REQUEST_HEAD = MAX_REQUEST_LINE + MAX_HEAD  # request line and header lines, bytes
MAX_FIELDS = 200  # header lines per request
RECEIVE_SIZE = 16_384  # bytes to receive at a time: so many each connection may keep,
MAX_RECEIVE_SIZE = 1_048_576  # in a long body,
FIRST_RECEIVE_SIZE = 512  # and where there may be thousands that wait
MAX_CHUNKS = 16_384  # chunks of a body: more of them only keep the server busy
MAX_CHUNK_LINE = 256  # size of a chunk with its extensions, bytes
MAX_PARAMETERS = 100  # fields of a query string or form
FORM_EXPANSION = 3  # bytes of percent-encoding per byte of a message
FORM_SLACK = 65_536  # other fields of a form, bytes
REQUEST_CACHE = 4  # parsed request heads kept per connection
HEADER_CACHE = 256  # parsed sets of header lines kept for all connections
MAX_CACHED_HEAD = 2_048  # longest head or set of header lines kept, bytes
NAME_CACHE = 1_024  # checked, encoded and decoded names kept

# Responses
MAX_RESPONSE_HEAD = 4_000  # bytes: proxies have a buffer of 4,096 for it, where Via may be added
COMMON_HEADERS = 600  # its part for those that every response has, and a Content-Type, bytes
MAX_TYPE = 255  # longest Content-Type of a message, bytes
MIN_ERROR = 256  # bytes of a reason for which other headers make room
MAX_IGNORED = 256  # names of unknown parameters in a response's head, bytes

# Connections
READ_TIMEOUT = 30  # time for a whole head, and again for a whole body, seconds
IDLE_TIMEOUT = 75  # silence allowed on a kept-alive connection, seconds; as nginx
SEND_TIMEOUT = 30  # time in which a client must accept SEND_CHUNK bytes, seconds
SEND_CHUNK = 262_144  # bytes sent per call
FILE_CHUNK = 262_144  # bytes of a backup sent at a time
LINGERING_CLOSE_BYTES = 16_777_216  # bytes discarded so that a client that still sends can read
LINGERING_CLOSE_TIMEOUT = 2.0  # its error response (RFC 9112 9.6); and the time for it, seconds
THREADLESS_INTERVAL = 50  # between reads from clients that got a 503 without a thread, milliseconds
DISCONNECT_CHECK_INTERVAL = 2.0  # seconds between checks of a waiting client that pipelines
STOP_TIMEOUT = 2.0  # time for running requests to finish when the server stops, seconds
RETRY_AFTER = 1  # seconds in the Retry-After header of a 503
SIMULTANEOUS_WINDOW = 0.01  # requests on two new connections this close count as simultaneous, s
MAX_SIMULTANEOUS = 1  # connections that a first request waits for: with more, each would wait
MAX_CONNECTIONS = 16_384  # largest default of --max-connections
WAITING_SHARE = 0.75  # part of the connections that may wait, so that producers get in
MAX_REFUSED_CONNECTIONS = 64  # connections beyond the limit that still receive a 503
PROBE_AFTER = 60  # silence after which the kernel probes whether the peer is still there, seconds;
PROBE_INTERVAL = 15  # until the next probe, seconds;
PROBES = 4  # without a response: the connection is closed after two minutes
BACKLOG = 4_096  # connections that the kernel queues until they are accepted
MAX_IDLE_THREADS = 8  # threads that wait for another connection after they have served one
SWITCH_INTERVAL = 1.0  # seconds that a thread computes before others get the interpreter
STACK_SIZE = 256 * 1024  # stack of a thread of the command-line server, bytes
SOCKET_MODE = 0o660  # of a Unix socket: who may connect, owner and group
SOCKET_PROBE_TIMEOUT = 1.0  # time for a server to accept a connection to its socket, seconds
NOTIFY_TIMEOUT = 1.0  # time in which the service manager must take a message, seconds
SPARE_DESCRIPTORS = 64  # file descriptors kept for the database, standard streams, refusals

# Memory
MAX_MEMORY = 1_000_000_000  # largest default of --max-memory, bytes,
MEMORY_SHARE = 4  # which is one part in this many of the machine's memory
CONNECTION_BYTES = 32_768  # for the default of --max-connections: for each of them, bytes
UNCOUNTED = 4_096  # what every connection may keep: counting it costs more than it is worth, bytes
SMALL_AMOUNT = 65_536  # an amount up to this may use the whole budget, bytes;
LARGE_SHARE = 0.75  # a larger one this part, so that deletes and small messages get through
ANONYMOUS_SHARE = 0.0625  # part for clients of which it is not known yet whether they have a token
MESSAGE_BYTES = 2_048  # a message's objects beside its body, bytes
MIN_TRIM = 16_000_000  # when half of so much is free again, it goes back to the system, bytes
M_MMAP_THRESHOLD = -3  # of mallopt, from glibc's malloc.h
SQLITE_CONFIG_MEMSTATUS = 9  # from sqlite3.h
PIECE_BYTES = 262_144  # JSON that is built at a time for a long response, bytes
WORK_TIME = 0.005  # time that a long response is worked on without a pause, seconds,
YIELD_TIME = 0.0001  # and the pause, so that other threads get the interpreter
GONE_AFTER = 1.0  # time after which a listing is not made for a client that half-closed, seconds

# Access
MAX_TOKEN = 1_024  # longest token, characters
MAX_TOKENS_FILE = 4_194_304  # size of a token file, characters: about ten thousand tokens
MAX_PATTERNS = 100  # patterns per token, each tried for each name
FREE_AUTH_FAILURES = 10  # wrong tokens per address and window that are answered at once
AUTH_FAILURE_WINDOW = 60.0  # seconds
AUTH_FAILURE_DELAY = 1.0  # delay of each further answer, seconds
MAX_DELAYED_FAILURES = 32  # answers delayed at the same time, a thread each; others get 429
MAX_FAILING_ADDRESSES = 4_096  # addresses whose wrong tokens are counted
CORS_MAX_AGE = 600  # time that a browser may cache a preflight response, seconds

# Database
DISK_RESERVE = 32 * 1024 * 1024  # disk space kept for takes and deletes, bytes,
DISK_RESERVE_SHARE = 10  # but at most one part in this many of a small disk
RESERVE_STEPS = 4  # parts in which the reserve is given up: another program may take each
SPACE_CHECK_INTERVAL = 0.02  # seconds between two looks at the free space
RESERVE_RETRY_DELAY = 1.0  # pause after the reserve could not be made whole, seconds
MESSAGE_OVERHEAD = 1_024  # columns and index entries of a message, bytes
MIN_GROWTH = 65_536  # room that a post leaves in the file for takes and deletes, bytes,
MAX_GROWTH = 1_048_576  # and with which the file grows ahead where the disk is large
BUSY_TIMEOUT = 5.0  # wait for another program's lock on the database, seconds
TICKER_RETRY_DELAY = 1.0  # pause of the ticker after an error of the database, seconds
STATEMENT_CACHE = 256  # prepared statements kept per connection: more than there are
LOG_PAGES = 1_000  # pages in the log at which SQLite writes them back into the file
LOG_SIZE_LIMIT = 16 * 1024 * 1024  # size to which SQLite cuts its log, bytes
SHM_PAGES = 4_096  # pages of the log per region of the `-shm` file,
SHM_REGION = 32_768  # and the size of one, bytes (sqlite.org/walformat.html 2.2)
MAX_SHM = 1_048_576  # bytes of the `-shm` file that are allocated at the start
MAX_BLOB = 1_000_000_000  # SQLite's largest value, bytes (sqlite.org/limits.html 1)
MAX_TRANSACTION_BYTES = 8_000_000  # bodies that a transaction adds or takes for several calls
TAKEN_BYTES = 100_000  # so much of them is expected for each message of a batch, bytes
LEASES_PER_RUN = 10**10  # more than a message can get until the next stop; see `_raise_leases`
BACKUP_PAGES = 1_024  # pages that a backup copies at a time

# Cluster
NODE_PORT = 4_001  # of rqlite, if the URL names none
NODE_TIMEOUT = 3.0  # silence of a node after which another one is asked, seconds,
NODE_RATE = 1_000_000  # and one more for so many bytes that are sent to it
CLUSTER_TIMEOUT = 12.0  # time in which a node must answer, or the call fails, seconds
NODE_RETRY_DELAY = 0.05  # pause before the next node is asked, seconds
TRANSFER_TIMEOUT = 600.0  # silence of a node that makes a copy of the database or loads one, s
MAX_IDLE_NODE_CONNECTIONS = 4  # open connections to a node that no request uses
LOOK_INTERVAL = 0.05  # between two looks at what other servers changed, seconds,
IDLE_LOOK_INTERVAL = 0.9  # while no consumer waits: below the shortest timeout and delay,
LOOK_SHARE = 0.2  # and so long that looking takes no larger part of the time
JOIN_TIMEOUT = 3.0  # time in which other servers must tell a new one the broker time, seconds
SESSION_TTL = 3_600  # age at which the session of a server that was killed is forgotten, seconds

# Time
TICK_INTERVAL = 1.0  # seconds between two looks at the clocks: a crash may follow a step
CLOCK_STEP = 0.5  # difference by which the wall clock has been stepped and not slewed, seconds
TIME_RECORD_INTERVAL = 60.0  # longest time between two records of broker time, seconds
TIME_RECORD_RETRY = 1.0  # shortest time between them, also after a failure, seconds
LONG_DOWNTIME = 30 * 86_400  # time between two runs that is worth a line in the log, seconds
WAIT_CHECK_INTERVAL = 3.0  # seconds between two looks for waits that a suspend has outlasted
WAIT_GRACE = 1.0  # time after its end that a wait has to end by itself, seconds
MISSED_AFTER = 60.0  # age of a due time that was missed, seconds: that of a schedule, from which
# it is posted only to catch up
SCHEDULE_LOOK = 60.0  # longest time between two looks at the schedules, which other servers change,
# and until one is tried again that cannot be calculated, seconds
CLOCK_CORRECTION = 10_800  # a clock that is set back by more was wrong, seconds; as cron(8)

# Metrics
METRICS_CHANNELS = 1_000  # default of --metrics-channels: channels with counters of their own
MAX_METRICS_CHANNELS = 10_000  # its largest value: a channel has about 1,000 bytes of each page
MAX_NOTED = 65_536  # values that a histogram has not counted yet: those of seconds, 32 bytes each
MAX_FLIGHTS = 32_768  # messages in flight whose channel is kept in memory, 300 bytes each
SAMPLE_INTERVAL = 5  # seconds between two points of the history
HISTORY_SECONDS = 3_600  # length of the history, seconds

# Live streams
MAX_EVENT_BODY = 65_536  # part of a body that an event shows, bytes; but PREVIEW_BYTES
MANY_MESSAGES = 16  # if a call may change more messages than this
EVENT_BYTES = 512  # an event's objects beside its body, bytes
MAX_BEHIND = 1_000_000  # events that a reader may not have read, bytes,
BEHIND_TIME = 2.0  # if the oldest is as old as this, seconds: a batch comes all at once
MAX_BURST = 16_000_000  # and in any case, bytes: two of the largest batches
SILENCE_LIMIT = 15.0  # longest silence of a stream, seconds: proxies close after 60
SSE_RETRY = 1_000  # time after which a browser connects again, milliseconds
LISTENER_CHECK_INTERVAL = 2.0  # seconds between two looks for readers that have gone
STREAM_PACE = 0.001  # pause after readers were woken, seconds for each: so streams take a small
# part of the time of the interpreter, and the more there are, the more events each sends at once

# Client and commands
CLIENT_TIMEOUT = 30.0  # time to connect, and longest silence of a server, seconds
BULK_WAIT = 3_600  # wait for the response to a drain or redrive: it may take minutes, seconds
KEEPALIVE_TIMEOUT = 60.0  # age at which a client drops an idle connection: below IDLE_TIMEOUT, s
MAX_RESPONSE = 256_000_000  # bytes: in JSON, control characters take six times MAX_BATCH_BYTES
MIN_RETRY_DELAY = 0.1  # pause before the first retry, seconds; doubled each time
MAX_RETRY_DELAY = 5.0  # up to this
FAILURE_DELAY = 10  # seconds until a message that a worker failed on is ready again
TOUCHES_PER_TIMEOUT = 3  # heartbeats of a worker within a message's timeout
HEARTBEAT_INTERVAL = 0.3  # seconds between checks whether one is due: below the shortest timeout/3
STOP_CHECK_INTERVAL = 0.3  # seconds between looks of a waiting client at its `stop` event
MAX_LINES_BYTES = 1_000_000  # lines per batch, bytes: in JSON less than MAX_BATCH_BYTES
MAX_TIMER = 1_000_000  # longest timeout of a command or a client, seconds: all timers accept it
MIN_COLUMN = 8  # width to which a column of a table may be shortened, characters
MAX_JOBS = 1_000  # commands that a worker runs at the same time
KILL_GRACE = 10.0  # seconds between SIGTERM and SIGKILL for a command
STDERR_TAIL = 3_072  # end of a command's standard error kept as the reason, bytes
STDERR_TIMEOUT = 0.2  # wait for the end of standard error after the command's end, seconds
BENCH_CONNECTIONS = 1_000  # connections of `bench`
BENCH_SECONDS = (0.01, 60.0)  # length of one measurement, seconds: every time is kept in memory
DISK_TEST_SECONDS = 1.0  # longest measurement of the disk, seconds
BENCH_BYTES = 10_000  # body of a message: 100 of them must fit into a response
BENCH_BATCH = 100  # messages per batch
BENCH_TIMEOUT = MAX_WAIT  # visibility timeout, seconds: no message may return while measuring


# ---------------------------------------------------------------------------------------------
# Errors: raised by every section below; the HTTP sections render them as responses.
# ---------------------------------------------------------------------------------------------


class LingerError(Exception):
    """A request that cannot be fulfilled; `str()` is one sentence for the client."""

    status = 500
    index: Optional[int] = None  # position of the bad item in a batch, from 0

    def __init__(self, message: str, status: int = 0, headers: str = "") -> None:
        """`headers` are complete header lines for the response."""
        super().__init__(message)
        self.status = status or self.status
        self.headers = headers


class BadRequest(LingerError):
    """A name, number or body is malformed."""

    status = 400


class AccessDenied(LingerError):
    """The token is missing or wrong (401), or lacks the right (403)."""

    status = 403


class NotFound(LingerError):
    """The message, path or channel does not exist."""

    status = 404


class Conflict(LingerError):
    """The message is not in the state that the call needs, or the lease was lost."""

    status = 409


class TooLarge(LingerError):
    """The body or batch exceeds a limit."""

    status = 413


class Unavailable(LingerError):
    """Not possible now; the same call may succeed later."""

    status = 503


class OutcomeUnknown(LingerError):
    """Whether it was done is not known: the cluster did not say."""

    status = 504


class Full(LingerError):
    """The channel is at its high-level mark, or the disk is full."""

    status = 507


ERRORS_BY_STATUS = {kind.status: kind for kind in LingerError.__subclasses__()}
NOTHING_CHANGED = ", nothing was changed"  # in errors; not in those of a call that works in pieces


def require_posix(program: str) -> None:
    """`Unavailable` on a system on which this program cannot run."""
    if not IS_POSIX:
        raise Unavailable(f"{program} needs a POSIX system such as Linux or macOS")


def log(text: str) -> None:
    """Writes a line to standard error, as `write_line`."""
    write_line(text, sys.stderr)


def write_line(text: str, file: Optional[TextIO]) -> None:
    """Writes a line to a standard stream, if that is open; a failure stops nothing."""
    if file is not None:  # None: `print` would write to standard output
        with contextlib.suppress(OSError, ValueError):
            line = printable(text, file) + "\n"
            print(line, end="", file=file, flush=True)  # one write: lines never mix


def reason_of(error: BaseException) -> str:
    """Returns what an error says; of one of the system without its number and path."""
    return getattr(error, "strerror", None) or str(error)


def printable(text: str, file: TextIO) -> str:
    """Returns a text with escapes for what a file cannot encode, as in a path that is not UTF-8."""
    encoding = file.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# ---------------------------------------------------------------------------------------------
# Memory: how many bytes clients make the server keep, all together.  Knows amounts, not what they
# are for.
#
# Counted are: heads and bodies that are being received, bodies until they are committed, messages
# that were taken or listed until they are sent, and responses and pieces of a backup until they
# are sent.  Not counted is what each connection has anyway: its thread, its objects, RECEIVE_SIZE
# and UNCOUNTED bytes.  --max-connections bounds that.
# ---------------------------------------------------------------------------------------------


class MemoryBudget:
    """Counts reserved bytes up to a limit; for any thread.

    An amount that is large may use only a share of the limit, so that small ones find room.  One
    amount alone may be of any size: nothing is refused forever.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._peak = 0  # since memory was last given back to the system
        # Held while a large body is parsed or a large response built: that takes a multiple of
        # its bytes for a moment, and would keep others waiting for the interpreter.
        self.large_work = threading.Lock()
        self._lock = threading.Lock()  # guards `used` and `_peak`

    def reserve(self, size: int, share: float = 1.0, kept: int = 0) -> None:
        """Reserves so many bytes in place of those `kept`; `Unavailable` changes nothing."""
        if size > SMALL_AMOUNT:
            share = min(share, LARGE_SHARE)
        with self._lock:
            others = self.used - kept
            if size > kept and others and others + size > self.limit * share:
                raise Unavailable(
                    "the server is short of memory, since other requests or responses are large:"
                    " try again soon"
                )
            self.used = others + size
            self._peak = max(self._peak, self.used)

    def force(self, size: int, kept: int = 0) -> None:
        """As `reserve`, also beyond the limit: for what cannot be refused any more."""
        with self._lock:
            self.used += size - kept
            self._peak = max(self._peak, self.used)
            if self._peak < MIN_TRIM or self.used > self._peak // 2:
                return
            self._peak = self.used
        with contextlib.suppress(RuntimeError):  # there are no more threads
            _thread.start_new_thread(trim_memory, ())

    def room(self) -> int:
        """How many bytes a large amount may have now, at least 1."""
        return max(int(self.limit * LARGE_SHARE) - self.used, 1)


class Reservation:
    """What one owner has reserved of a budget; used by one thread at a time."""

    __slots__ = ("_budget", "size")

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.size = 0  # bytes

    def resize(self, size: int, share: float = 1.0) -> None:
        """Reserves or releases, so that it has so many bytes; `Unavailable` changes nothing."""
        if size <= UNCOUNTED:
            size = 0
        if size != self.size:
            self._budget.reserve(size, share, self.size)
            self.size = size

    def force(self, size: int) -> None:
        """As `resize`, also beyond the limit."""
        self._budget.force(size, self.size)
        self.size = size

    def release(self) -> None:
        """Gives all back."""
        if self.size:
            self.force(0)

    def room(self) -> int:
        """How many bytes it may have now, at least 1."""
        return self._budget.room() + self.size


def tune_memory() -> None:
    """Lets the C library of Linux give each large block back to the system once it is freed.

    Otherwise it raises the size from which it does so with the first block of some megabytes, and
    a process that has held 400 MB in bodies keeps as much again.  And lets the garbage collector
    pass over the 20,000 objects of the program: a look at all of them, every few seconds of work,
    took about 15 ms on a busy machine.
    """
    gc.freeze()
    with contextlib.suppress(AttributeError, ImportError, OSError):  # another library
        import ctypes

        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL_AMOUNT)


@functools.cache  # after the first call it does not count any more
def tune_sqlite() -> None:
    """Keeps SQLite from counting the memory that it uses, as its developers recommend: that takes
    a lock for each of the 140 blocks that a job needs.

    SQLite must be shut down for it, and must not be while this process has a database open
    (sqlite.org/c3ref/initialize.html).  While SQLite still counts, a count of 0 says that none is.
    """
    if not sys.platform.startswith("linux"):  # ctypes may pass variadic arguments wrongly elsewhere
        return
    with contextlib.suppress(AttributeError, ImportError, OSError):  # it is built in
        import _sqlite3
        import ctypes

        library = ctypes.CDLL(_sqlite3.__file__)
        if library.sqlite3_memory_used() == 0:
            library.sqlite3_shutdown()
            library.sqlite3_config(SQLITE_CONFIG_MEMSTATUS, 0)


def trim_memory() -> None:
    """Gives the pages that are free between smaller blocks back to the system."""
    with contextlib.suppress(AttributeError, ImportError, OSError):  # another library
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less in a control group."""
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):  # a system that does not tell
        limits = [MEMORY_SHARE * MAX_MEMORY]
    for path in _memory_limit_files():
        with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
            limits.append(int(file.read()))  # ValueError: it says "max"
    return min(limits)


def _memory_limit_files() -> Iterator[str]:
    """The files with the limits of this process's control groups, version 1 or 2."""
    lines: list[str] = []
    with contextlib.suppress(OSError, ValueError), open("/proc/self/cgroup") as file:
        lines = file.read().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = path.strip("/").split("/")
        for depth in range(len(parts) + 1):  # a group has no more than those around it
            yield os.path.join(root, *parts[:depth], name)


def default_max_memory() -> int:
    """The default of --max-memory, bytes."""
    return min(machine_memory() // MEMORY_SHARE, MAX_MEMORY)


def default_max_connections() -> int:
    """The default of --max-connections: as many as a second share of the memory holds."""
    return min(machine_memory() // MEMORY_SHARE // CONNECTION_BYTES, MAX_CONNECTIONS)


# ---------------------------------------------------------------------------------------------
# Messages: the record that a consumer receives, the table of message parameters, and the parsing
# of names and numbers.  Values may come from HTTP (text), JSON or Python: nothing here knows which.
# ---------------------------------------------------------------------------------------------

DEFAULT_TYPE = "text/plain"
OWN_HEADER = "x-linger-h-"  # begins the names of a message's own headers
# Among its header lines if somebody waits for a reply; no value of a header ends with a space.
REPLY_LINE = "x-linger-reply-to: \r\n"


class Message(NamedTuple):
    """A message as delivered to a consumer.  Times are in seconds."""

    id: int
    channel: str
    priority: int  # a lower number is delivered first
    timeout: int  # how long this delivery stays hidden
    deliver: int  # limit of deliveries, 0 = unlimited
    delivered: int  # deliveries so far, including this one
    received: int  # age since the post
    linger: int  # lifetime since the post, 0 = unlimited
    topic: str  # topic of the publication, or empty
    lease: int  # number of this delivery, never used twice for this message
    type: str  # Content-Type of the body
    body: bytes
    dead_from: str = ""  # for a dead letter: the channel that it came from,
    dead_reason: str = ""  # and why: deliver, linger or reject
    error: str = ""  # reason given with the last release or rejection
    backoff: str = ""  # time hidden after the 1st, 2nd, ... failed delivery, as 10,60,600
    dead_delivered: int = 0  # for a dead letter: how often it was delivered before
    header_lines: str = ""  # the lines of its own headers, as a delivery has them
    group: str = ""  # its messages are delivered in the order of their posts, one at a time
    # Only in listings and read_message:
    dead: str = ""  # channel for the message when it becomes a dead letter
    delay: int = 0  # time until a delayed message is ready
    unique: str = ""  # unique key
    hidden_for: int = 0  # time until a message in flight is ready again,
    holder: str = ""  # and the consumer that has it: its name or address, while the server knows it

    @property
    def text(self) -> str:
        """The body decoded as UTF-8; raises UnicodeDecodeError."""
        return self.body.decode("utf-8")

    def json(self) -> Any:
        """The body parsed as JSON; raises ValueError."""
        return json.loads(self.body)

    @property
    def reply_to(self) -> str:
        """The path to which a reply is posted, if somebody waits for one."""
        return f"/messages/{self.id}/reply" if REPLY_LINE in self.header_lines else ""

    @property
    def headers(self) -> dict[str, str]:
        """Its own headers: those that were given when it was posted, by name in lower case."""
        lines = self.header_lines.replace(REPLY_LINE, "").split("\r\n")[:-1]
        pairs = (line[len(OWN_HEADER) :].partition(": ") for line in lines)
        return {name: value for name, _, value in pairs}


# The defaults of those fields that a row does not have, at their places in a `Message`.
LAST_FIELDS = tuple(map(Message._field_defaults.get, Message._fields))
Taken = tuple[int, str, int]  # what an undo needs of a message: id, channel and lease
TAKEN_OF = operator.itemgetter(*map(Message._fields.index, ("id", "channel", "lease")))
PRIORITY_OF = operator.attrgetter("priority")


def message_of(row: tuple[Any, ...]) -> Message:
    """The message in a row of NEXT_MESSAGE or READ_MESSAGE; the last column is no field of it."""
    fields = row[:-1] + LAST_FIELDS[len(row) - 1 :]
    message = tuple.__new__(Message, fields)  # twice as fast as Message()
    return message._replace(backoff=backoff_text(message.backoff)) if message.backoff else message


def backoff_text(backoff: str) -> str:
    """A backoff as it was given, from the fields in which it is kept."""
    return ",".join(backoff.split())


class PostResult(NamedTuple):
    """The id of the posted message; for a duplicate, the id of the message posted before."""

    id: int
    duplicate: bool = False


INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # name of a header (RFC 9110 5.6.2)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
VISIBLE = re.compile("[!-~]*")


def parse_integer(
    name: str, value: object, minimum: int = MIN_INTEGER, maximum: int = MAX_INTEGER
) -> int:
    """Returns the integer in a text or number; `BadRequest` names the parameter and its range."""
    number = None
    if isinstance(value, str):
        number = int(value) if INTEGER.fullmatch(value) else None
    elif type(value) is int or (isinstance(value, int) and not isinstance(value, bool)):
        number = value
    if number is None or not minimum <= number <= maximum:
        raise BadRequest(f"{name} must be an integer from {minimum} to {maximum}")
    return number


@functools.lru_cache(NAME_CACHE)
def check_name(kind: str, name: object) -> str:
    """Returns the name of a channel or topic (`kind`) unchanged; `BadRequest` if it is invalid."""
    if not isinstance(name, str):
        raise BadRequest(f"a {kind}'s name must be text")
    if name.isascii() and name.isprintable() and 1 <= len(name) <= MAX_NAME:
        return name
    if CONTROL.search(name):
        raise BadRequest(f"a {kind}'s name must be Unicode text without control characters")
    if not 1 <= len(name.encode()) <= MAX_NAME:
        raise BadRequest(f"a {kind}'s name must have 1 to {MAX_NAME} bytes in UTF-8")
    return name


def integer_from(minimum: int, maximum: int = MAX_INTEGER) -> Callable[[str, object], int]:
    """The parser of an integer in a range."""
    return functools.partial(parse_integer, minimum=minimum, maximum=maximum)


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    """Returns a value unchanged; `BadRequest` if it is none of the choices."""
    if value not in choices:
        raise BadRequest(f"{name} must be one of {', '.join(choices)}")
    return value


def _parse_dead_channel(_: str, value: object) -> str:
    """Returns the name of a channel, or an empty text for none."""
    if not isinstance(value, str):
        raise BadRequest("dead must be the name of a channel")
    return "" if value == "" else check_name("dead channel", value)


def _parse_backoff(name: str, value: object) -> str:
    """Returns the steps of a backoff, each padded to BACKOFF_WIDTH characters."""
    if value == "":
        return ""
    steps = value.split(",") if isinstance(value, str) else []
    if not 1 <= len(steps) <= MAX_BACKOFF or not all(s.isascii() and s.isdigit() for s in steps):
        raise BadRequest(f"{name} must be 1 to {MAX_BACKOFF} numbers of seconds, as 10,60,600")
    if max(map(len, steps)) >= BACKOFF_WIDTH:
        raise BadRequest(f"the seconds of {name} must have fewer than {BACKOFF_WIDTH} digits")
    return "".join(step.rjust(BACKOFF_WIDTH) for step in steps)


def _parse_key(name: str, value: object) -> str:
    if isinstance(value, str):
        with contextlib.suppress(UnicodeEncodeError):
            if 1 <= len(value.encode()) <= MAX_NAME:
                return value
    raise BadRequest(f"{name} must be a text of 1 to {MAX_NAME} bytes in UTF-8")


def parse_own_headers(name: str, value: object) -> str:
    """Returns the header lines of a message's own headers, given by name."""
    if not isinstance(value, Mapping):
        raise BadRequest(f"{name} must be an object; over HTTP each is a header {OWN_HEADER}<name>")
    own = {str(key).lower(): text for key, text in value.items()}
    for key, text in own.items():
        if not TOKEN.fullmatch(key):
            raise BadRequest(
                f"{name}: the name of a header must consist of letters, digits and"
                f" !#$%&'*+-.^_`|~: {key}"
            )
        if not isinstance(text, str) or text != text.strip(" ") or CONTROL.search(text):
            raise BadRequest(
                f"{name}: {key} must be text without control characters, or spaces at its ends"
            )
    if len(own) < len(value):
        raise BadRequest(f"{name} must have different names, also in lower case")
    size = sum(len(key) + len(text.encode()) for key, text in own.items())
    if len(value) > MAX_OWN_HEADERS or size > MAX_OWN_BYTES:
        raise BadRequest(
            f"a message may have {MAX_OWN_HEADERS} headers of its own, with {MAX_OWN_BYTES} bytes"
            " of names and values in all"
        )
    return "".join(f"{OWN_HEADER}{key}: {text}\r\n" for key, text in own.items())


class Parameter(NamedTuple):
    """A parameter of a message.  In Python its name has `_` in place of `-`."""

    name: str
    default: object
    parse: Callable[[str, object], object]  # (name, value) to the stored value, or BadRequest
    help: str


# For one message, for all messages of a subscription, or as a channel's setting.
MESSAGE_PARAMETERS = (
    Parameter("priority", 0, integer_from(MIN_INTEGER), "lower numbers are delivered first"),
    Parameter("timeout", 30, integer_from(1), "seconds that a delivered message stays hidden"),
    Parameter("deliver", 0, integer_from(0), "limit of deliveries, 0 = unlimited"),
    Parameter("linger", 0, integer_from(0), "lifetime in seconds, 0 = unlimited"),
    Parameter("delay", 0, integer_from(0), "seconds until the message is first ready"),
    Parameter("dead", "", _parse_dead_channel, "channel for dead letters"),
    Parameter("backoff", "", _parse_backoff, "seconds hidden after the 1st, 2nd, ... failure"),
)
# Those that can be changed while a message waits.
CHANGE_PARAMETERS = tuple(p for p in MESSAGE_PARAMETERS if p.name not in ("linger", "backoff"))
# For one message only.
SINGLE_PARAMETERS = (
    Parameter("dedup", None, _parse_key, "key that makes a repeated post a duplicate"),
    Parameter("dedup-for", 300, integer_from(1), "seconds that the dedup key is remembered"),
    Parameter("unique", None, _parse_key, "key that only one message of the channel may have"),
    Parameter("headers", "", parse_own_headers, "headers of its own, by name"),
    Parameter("group", "", _parse_key, "key of messages delivered in order, one at a time"),
)
PUBLISH_PARAMETERS = tuple(p for p in SINGLE_PARAMETERS if p.name != "unique")
CHANNEL_PARAMETERS = (
    *MESSAGE_PARAMETERS,
    Parameter("hlm", None, integer_from(0), "high-level mark of the channel, 0 = unlimited"),
    Parameter("max-in-flight", None, integer_from(0), "limit of messages in flight, 0 = unlimited"),
)
# For a topic.
RETENTION_PARAMETERS = (
    Parameter("keep", None, integer_from(1, MAX_KEPT), "publications to keep, the last ones"),
    Parameter("keep-for", None, integer_from(1), "seconds to keep each publication"),
)
ALL_PARAMETERS = MESSAGE_PARAMETERS + SINGLE_PARAMETERS
CALL_PARAMETERS = tuple(p for p in ALL_PARAMETERS if p.name not in ("dedup", "dedup-for", "unique"))
DEFAULTS: dict[str, Any] = {p.name: p.default for p in ALL_PARAMETERS}


def names_in(table: Sequence[Parameter]) -> tuple[str, ...]:
    """The names of the parameters of a table."""
    return tuple(parameter.name for parameter in table)


if TYPE_CHECKING:  # the same tables for a type checker; None is as not given

    class MessageFields(TypedDict, total=False):
        """The values of MESSAGE_PARAMETERS."""

        priority: Optional[int]
        timeout: Optional[int]
        deliver: Optional[int]
        linger: Optional[int]
        delay: Optional[int]
        dead: Optional[str]
        backoff: Optional[str]

    class PublishKeys(TypedDict, total=False):
        """The values of PUBLISH_PARAMETERS."""

        dedup: Optional[str]
        dedup_for: Optional[int]
        headers: Optional[Mapping[str, str]]
        group: Optional[str]

    class PostFields(MessageFields, PublishKeys, total=False):
        """The values of ALL_PARAMETERS."""

        unique: Optional[str]

    class ChannelFields(MessageFields, total=False):
        """The values of CHANNEL_PARAMETERS."""

        hlm: Optional[int]
        max_in_flight: Optional[int]


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """`BadRequest` if a name is unknown; it suggests the nearest one."""
    known = [name.replace("-", "_") for name in known]
    for name in names:
        if name.replace("-", "_") not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise BadRequest(f"unknown {kind} {name}: {hint}known are {', '.join(known)}")


def check_parameters(given: Mapping[str, object], table: Sequence[Parameter]) -> None:
    """`BadRequest` for a parameter that is not in the table: `parse_parameters` ignores it."""
    if given:
        check_names("parameter", given, names_in(table))


def parse_parameters(
    values: Mapping[str, object], table: Sequence[Parameter] = MESSAGE_PARAMETERS
) -> dict[str, Any]:
    """Returns the given parameters of a table, parsed, by name; ignores all others.

    `BadRequest` names the parameter that is invalid.
    """
    if not values:
        return {}
    parsed: dict[str, Any] = {}
    for name, _, parse, _ in table:
        value = values.get(name, values.get(name.replace("-", "_")))
        if value is not None:
            parsed[name] = parse(name, value)
    validate_linger(parsed)
    return parsed


def validate_linger(parameters: Mapping[str, Any]) -> None:
    """Raises `BadRequest` if a message with these parameters would expire before it is ready."""
    linger = parameters.get("linger")
    if linger and parameters.get("delay", 0) >= linger:
        raise BadRequest("linger is counted from the post, so it must be longer than delay")


# ---------------------------------------------------------------------------------------------
# Schema: tables, indexes and triggers, and the migration of a database of Linger 1.0.1.  An index
# names the statements that need it.
# ---------------------------------------------------------------------------------------------

APPLICATION_ID = 0x4C494E47  # "LING", at byte 68 of the file (sqlite.org/fileformat2.html 1.3)
SCHEMA_VERSION = 4  # `pragma user_version`; a database of Linger 1.0.1 has 0

ADD_TO_COUNTS = """
        -- for the triggers, which keep the counts of each channel
        insert or ignore into channels (name, ready, in_flight, delayed, blocked, urgent, niced)
        values (new.channel, 0, 0, 0, 0, 0, 0);
        update channels
        set ready = ready + (new.state = 0),
            in_flight = in_flight + (new.state = 1),
            delayed = delayed + (new.state = 2),
            blocked = blocked + new.blocked,
            urgent = urgent + (new.priority < 0),
            niced = niced + (new.priority > 0)
        where name = new.channel;
"""

SUBTRACT_FROM_COUNTS = """
        -- a channel without messages has no row
        update channels
        set ready = ready - (old.state = 0),
            in_flight = in_flight - (old.state = 1),
            delayed = delayed - (old.state = 2),
            blocked = blocked - old.blocked,
            urgent = urgent - (old.priority < 0),
            niced = niced - (old.priority > 0)
        where name = old.channel;
        update channels
        set left_group = old.group_key
        where name = old.channel and old.group_key <> '' and old.blocked = 0 and old.dead_from = '';
        delete from channels
        where name = old.channel and ready = 0 and in_flight = 0 and delayed = 0
            and urgent = 0 and niced = 0;
"""

# The columns for MESSAGE_PARAMETERS, of a subscription or as settings.  Null is a parameter
# that was not given: the channel's setting or the default holds.
PARAMETER_TYPES = """priority integer,
        timeout integer,
        deliver integer,
        linger integer,
        delay integer,
        dead text,
        backoff text"""

# SQLite keeps a journal of its own for each statement with a trigger that may fail and be undone
# alone.  None has to: an error ends the whole transaction.  (So the statements of a post, take and
# delete use no upsert, nor a function such as max() with two arguments: SQLite supposes that these
# fail.)
NOT_NULL = "not null on conflict fail"

SCHEMA = (
    """
    create table config (
        key text primary key,
        value text not null
    ) without rowid
    """,
    # state: 0 ready, 1 in flight, 2 delayed; 3 dead, which no row is after a commit.
    # due_at: when a message in flight or delayed becomes ready; for a ready one, when it became so.
    # leased: 1 from a delivery until its release or undo.  It stays 1 after the timeout: until the
    # next delivery the worker may still touch, release or delete the message.
    # expires_at: when `linger` ends, 0 for never.
    # group_key: empty for none.  blocked: 1 if it waits for an earlier message of its group; then
    # it is in state 2, and its due_at is 1e12 seconds late, which no timer reaches.  Of a group
    # all but one are blocked; a dead letter is in none until it comes back.
    # A take changes no column's length, so that SQLite writes the row in place and does not touch
    # the pages of a long body.
    """
    create table messages (
        id integer primary key autoincrement,
        channel text not null,
        priority integer not null,
        state integer not null,
        due_at real not null,
        timeout integer not null,
        deliver integer not null,
        delivered integer not null default 0,
        lease integer not null default 0,
        leased integer not null default 0,
        received real not null,
        linger integer not null,
        expires_at real not null,
        topic text not null default '',
        type text not null,
        dead text not null default '',
        backoff text not null default '',
        unique_key text,
        dead_from text not null default '',
        dead_reason text not null default '',
        dead_delivered integer not null default 0,
        error text not null default '',
        headers text not null default '',
        group_key text not null default '',
        blocked integer not null default 0,
        body blob not null
    )
    """.replace("not null", NOT_NULL),
    # for POST_MESSAGE, and for the triggers: the messages of a group
    """
    create index group_messages on messages (channel, group_key, blocked)
    where group_key <> '' and dead_from = ''
    """,
    # for NEXT_MESSAGE and BATCH_IDS: the first ready messages of a channel; with `expires_at`, so
    # that expired ones are passed over without a look at their rows
    """
    create index ready_messages on messages (channel, priority, id, state, expires_at)
    where state = 0
    """,
    # for PROCESS_DUE: timeouts and delays that have ended
    """
    create index due_messages on messages (channel, due_at, priority)
    where state > 0
    """,
    # for PROCESS_DUE: expired messages; one in flight stays until its timeout
    """
    create index lingering_messages on messages (channel, expires_at)
    where expires_at > 0 and state <> 1
    """,
    # for OLDEST_READY; those of priority 0 are in the order of arrival in ready_messages
    """
    create index oldest_messages on messages (channel, received)
    where state = 0 and priority <> 0
    """,
    # for MOVE_DEAD and DELETE_DEAD: messages that an earlier statement has put into state 3
    """
    create index dead_messages on messages (state, priority, id)
    where state > 2
    """,
    # for OLDEST_DEAD and NEWEST_DEAD; no other message has a reason after a commit
    """
    create index dead_letters on messages (dead_reason, id)
    where dead_reason <> ''
    """,
    # for POST_MESSAGE
    """
    create index unique_messages on messages (channel, unique_key)
    where unique_key is not null
    """,
    # The counts of each channel that has messages, kept by the triggers.  delayed: those in state
    # 2, hence the blocked ones as well.  left_group: the last group that a message has left; a
    # message without one must not pay for the program that looks for the next of its group.
    """
    create table channels (
        name text primary key,
        ready integer not null,
        in_flight integer not null,
        delayed integer not null,
        blocked integer not null,
        urgent integer not null,
        niced integer not null,
        left_group text not null default ''
    ) without rowid
    """.replace("not null", NOT_NULL),
    f"""
    create trigger message_added after insert on messages
    begin {ADD_TO_COUNTS} end
    """,
    """
    create trigger message_changed after update of state on messages
    when old.state <> new.state and old.channel = new.channel
    begin
        update channels
        set ready = ready + (new.state = 0) - (old.state = 0),
            in_flight = in_flight + (new.state = 1) - (old.state = 1),
            delayed = delayed + (new.state = 2) - (old.state = 2)
        where name = new.channel;
    end
    """,
    """
    create trigger message_blocked after update of blocked on messages
    when old.blocked <> new.blocked and old.channel = new.channel
    begin
        update channels
        set blocked = blocked + new.blocked - old.blocked
        where name = new.channel;
    end
    """,
    """
    create trigger message_reordered after update of priority on messages
    when old.priority <> new.priority and old.channel = new.channel
    begin
        update channels
        set urgent = urgent + (new.priority < 0) - (old.priority < 0),
            niced = niced + (new.priority > 0) - (old.priority > 0)
        where name = new.channel;
    end
    """,
    f"""
    create trigger message_moved after update of channel on messages
    when old.channel <> new.channel
    begin {SUBTRACT_FROM_COUNTS} {ADD_TO_COUNTS} end
    """,
    f"""
    create trigger message_removed after delete on messages
    begin {SUBTRACT_FROM_COUNTS} end
    """,
    # A message leaves its group, and was not blocked: the next one gets the delay that it has by
    # itself, which ProcessDue ends if it has passed.
    """
    create trigger group_advances after update of left_group on channels
    begin
        update messages
        set blocked = 0, due_at = due_at - 1e12
        where id = (
            select id
            from messages
            where channel = new.name and group_key = new.left_group and group_key <> ''
                and dead_from = '' and blocked = 1
            order by id
            limit 1
        );
    end
    """,
    # A message comes back to its group: those that were posted later wait for it, but for one that
    # is in flight.
    """
    create trigger group_goes_back after update of channel on messages
    when new.group_key <> '' and new.dead_from = ''
    begin
        update messages
        set blocked = 1, state = 2, leased = 0, due_at = due_at + 1e12
        where channel = new.channel and group_key = new.group_key and group_key <> ''
            and dead_from = '' and blocked = 0 and state <> 1 and id > new.id;
    end
    """,
    # The ids that a take of several messages has found, as a JSON array, for its other statements.
    """
    create table picked (
        only integer primary key,
        ids text not null
    )
    """,
    f"""
    create table subscriptions (
        topic text not null,
        channel text not null,
        {PARAMETER_TYPES},
        created real not null,
        primary key (topic, channel)
    ) without rowid
    """,
    # for TOPICS_OF_CHANNEL
    """
    create index subscriptions_by_channel on subscriptions (channel, topic)
    """,
    f"""
    create table settings (
        channel text primary key,
        {PARAMETER_TYPES},
        hlm integer,
        max_in_flight integer
    ) without rowid
    """,
    """
    create table pauses (
        channel text primary key,
        until real not null
    ) without rowid
    """,
    # Which topics keep publications: the last `keep`, each for `keep_for` seconds; null: any.
    # A topic that is to keep none any more has a keep of 0 until its last one is deleted.
    """
    create table retention (
        topic text primary key,
        keep integer,
        keep_for integer
    ) without rowid
    """,
    # Those that are kept, also some that are to be deleted.  seq: counts those of the topic.
    """
    create table publications (
        id integer primary key autoincrement,
        topic text not null,
        seq integer not null,
        at real not null,
        type text not null,
        headers text not null,
        group_key text not null,
        body blob not null
    )
    """,
    # for KEPT_PUBLICATIONS and TRIM_PUBLICATIONS: those of a topic in their order
    """
    create index publications_by_topic on publications (topic, id)
    """,
    # As `subscriptions`, but to all topics that match a pattern.
    f"""
    create table patterns (
        pattern text not null,
        channel text not null,
        {PARAMETER_TYPES},
        created real not null,
        primary key (pattern, channel)
    ) without rowid
    """,
    # for PATTERNS_OF_CHANNEL
    """
    create index patterns_by_channel on patterns (channel, pattern)
    """,
    # Each server of a cluster keeps copies of these tables, and learns here that they changed.
    *(
        f"""
    create trigger {table}_{event} after {event} on {table}
    begin
        insert into config (key, value)
        values ('changes', '1')
        on conflict (key) do update set value = value + 1;
    end
    """
        for table in ("settings", "pauses", "patterns", "retention")
        for event in ("insert", "update", "delete")
    ),
    # The servers of a cluster.  turn: the number of the last transaction of each, 0 until it has
    # learned the broker time; at: the broker time of that transaction.
    """
    create table sessions (
        name text primary key,
        turn integer not null,
        at real not null
    ) without rowid
    """,
    # Messages to be posted again and again: by the wall clock (`cron`), or `every` so many seconds.
    # next_at: the next due time, in Unix time for cron, in broker time for `every`.
    # done_until: the Unix time up to which all due times are done.
    # parameters: those of the message that were given, as a JSON object.
    """
    create table schedules (
        name text primary key,
        channel text not null,
        cron text not null,
        tz text not null,
        every integer not null,
        catch_up integer not null,
        next_at real not null,
        done_until real not null,
        version integer not null default 1,
        last_at real,
        last_id integer,
        last_error text not null default '',
        parameters text not null,
        type text not null,
        body blob not null
    )
    """,
    # Replies to messages that were called, by their ids; a long one is emptied when it was taken.
    """
    create table replies (
        id integer primary key,
        type text not null,
        body blob not null,
        until real not null
    )
    """,
    # for DELETE_OLD_REPLIES
    """
    create index replies_by_end on replies (until)
    """,
    # Keys of messages that must not be added twice.  scope: `channel <name>` or `topic <name>`,
    # with `batch ` before it for the keys of whole batches; result: the id, or for a topic a line
    # `<id> <channel>` for each copy, and `<id> ` for a publication that is kept.
    """
    create table dedups (
        scope text not null,
        key text not null,
        until real not null,
        result text not null,
        primary key (scope, key)
    ) without rowid
    """,
    # for DELETE_OLD_DEDUPS
    """
    create index dedups_by_end on dedups (until)
    """,
)

# A database of Linger 1.0.1.  Its columns have no types: a body may be text, and `show` is 0 or
# the time until which a message is hidden.
BEFORE_MIGRATION = (
    "alter table config rename to old_config",
    "alter table messages rename to old_messages",
    "alter table subscriptions rename to old_subscriptions",
)
AFTER_MIGRATION = (
    """
    insert into config (key, value)
    select key, value
    from old_config
    where key = 'server_id'
    order by key
    """,
    """
    insert into messages (id, channel, priority, state, due_at, timeout, deliver, delivered,
        lease, leased, received, linger, expires_at, topic, type, body)
    select id, channel, priority, show > 0, max(show, ts), timeout, deliver, dcount,
        dcount, dcount > 0 or show > 0, ts, linger, max(purge, 0), topic, mimetype,
        cast(body as blob)
    from old_messages
    order by id
    """,
    """
    insert into subscriptions (topic, channel, priority, timeout, deliver, linger, created)
    select topic, channel, nullif(priority, 0), nullif(timeout, 30), nullif(deliver, 0),
        nullif(linger, 0), ts
    from old_subscriptions
    order by topic, channel
    """,
    # The next id is the one that 1.0.1 would have given.
    "delete from sqlite_sequence where name = 'messages'",
    "update sqlite_sequence set name = 'messages' where name = 'old_messages'",
    "drop table old_config",
    "drop table old_messages",
    "drop table old_subscriptions",
)


# ---------------------------------------------------------------------------------------------
# SQL: the statements that change messages, a constant each.  They run again and again.
#
# A statement sees time only as :now (broker time, in seconds), decides by itself, and fits SQLite
# 3.31: no RETURNING, no clock or random function, no PRAGMA.  Lists of columns and expressions
# that several statements share stand once, and are put in when the file is loaded.  A condition
# that seems needless, as in `state = 3 and state > 2`, is that of a partial index: SQLite uses the
# index only for a statement that repeats it (sqlite.org/partialindex.html 3).
# ---------------------------------------------------------------------------------------------

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

# Unless nothing is stored for which the time matters, or :always.
RECORD_TIME = """
insert into config (key, value)
select 'time', :time
where :always or exists (select 1 from channels) or exists (select 1 from pauses)
    or exists (select 1 from dedups) or exists (select 1 from schedules)
    or exists (select 1 from retention)
on conflict (key) do update set value = excluded.value
"""

# The times of 1.0.1 are of a wall clock that may have been wrong, as may the one of this start:
# nothing was received later than now, is hidden for longer than its timeout, or lingers for longer
# than its `linger`.
TAKE_OVER_TIMES = """
update messages
set received = min(received, :now),
    due_at = case when state = 1 then min(due_at, :now + timeout) else due_at end,
    expires_at = min(expires_at, :now + linger)
where received > :now or state = 1 and due_at > :now + timeout or expires_at > :now + linger
"""

# -- producing

DEDUP_EXISTS = """exists (
        select 1 from dedups where scope = :scope and key = :dedup and until > :now)"""

FIND_DEDUP = """
select result
from dedups
where scope = :scope and key = :dedup and until > :now
"""

# An expired message that is still there does not count.
HOLDS_UNIQUE = """channel = :channel and unique_key = :unique
            and (expires_at = 0 or expires_at > :now or state = 1)"""

FIND_UNIQUE = f"""
select id
from messages
where {HOLDS_UNIQUE}
"""

# Whether a message that comes to a channel must wait for another of its group.
IS_BLOCKED = """({group} <> '' and exists (
        select 1
        from messages as others
        where others.channel = {channel} and others.group_key = {group} and others.group_key <> ''
            and others.dead_from = ''))"""

# The same of one that comes back: only for those posted before, and for one in flight.
IS_BLOCKED_AGAIN = """({group} <> '' and exists (
        select 1
        from messages as others
        where others.channel = {channel} and others.group_key = {group} and others.group_key <> ''
            and others.dead_from = '' and others.blocked = 0
            and (others.state = 1 or others.id < {id})))"""

# The usual case: no keys, no high-level mark, no headers, no group (EXTRAS_OF).
ADD_MESSAGE = """
insert into messages (channel, priority, state, due_at, timeout, deliver, received, linger,
    expires_at, type, dead, backoff, body)
values (:channel, :priority, :state, :due_at, :timeout, :deliver, :now, :linger,
    :expires_at, :type, :dead, :backoff, :body)
"""

KEYS_OF = operator.itemgetter("dedup", "unique")  # None, or not empty
EXTRAS_OF = operator.itemgetter("dedup", "unique", "hlm", "headers", "group")
NEW_BODY_OF, NEW_STATE_OF = operator.itemgetter("body"), operator.itemgetter("state")

BATCH_FITS = "exists (select 1 from config where key = 'batch fits')"

# A key that was not given is null.  For a batch, CHECK_BATCH_FITS has looked at the mark.
POST_MESSAGE = f"""
insert into messages (channel, priority, state, due_at, timeout, deliver, received, linger,
    expires_at, type, dead, backoff, unique_key, headers, group_key, blocked, body)
select :channel, :priority, case when blocked then 2 else :state end, :due_at + blocked * 1e12,
    :timeout, :deliver, :now, :linger, :expires_at, :type, :dead, :backoff, :unique, :headers,
    :group, blocked, :body
from (select {IS_BLOCKED.format(channel=":channel", group=":group")} as blocked)
where case
        when :hlm = 0 then 1
        when :batch then {BATCH_FITS}
        else :hlm > coalesce(
            (select ready + in_flight + delayed from channels where name = :channel), 0)
    end
    and (:dedup is null or not {DEDUP_EXISTS})
    and (:unique is null or not exists (
        select 1 from messages where {HOLDS_UNIQUE}))
"""

# After POST_MESSAGE, if it added a message, or found that of the unique key, but no dedup key.
SAVE_DEDUP = f"""
insert into dedups (scope, key, until, result)
select :scope, :dedup, :now + :dedup_for, cast(id as text)
from (
    select case
            when changes() = 1 then last_insert_rowid()
            else (select id from messages where {HOLDS_UNIQUE})
        end as id
)
where :dedup is not null and id is not null and not {DEDUP_EXISTS}
on conflict (scope, key) do update set until = excluded.until, result = excluded.result
"""

LAST_ID = """
select last_insert_rowid()
"""

# Another server, or another thread, may have done the due time :expected, or changed the schedule.
IS_EXPECTED = "name = :schedule and next_at = :expected and version = :version"

POST_SCHEDULED = f"""{POST_MESSAGE}    and exists (select 1 from schedules where {IS_EXPECTED})
"""

# After POST_SCHEDULED: the due time is done, whether the message was added or not.
SCHEDULE_POSTED = f"""
update schedules
set next_at = :next,
    done_until = :wall,
    last_at = :wall,
    last_id = case
        when changes() = 1 then last_insert_rowid()
        else (select id from messages where {HOLDS_UNIQUE})
    end,
    last_error = case
        when changes() = 1 or exists (select 1 from messages where {HOLDS_UNIQUE}) then ''
        else :error
    end
where {IS_EXPECTED}
"""

# Before and after the messages of a batch, which fit into the channel all or not at all.
CHECK_BATCH_FITS = """
insert into config (key, value)
select 'batch fits', 'yes'
where :hlm >= :count + coalesce(
    (select ready + in_flight + delayed from channels where name = :channel), 0)
"""

CLEAR_BATCH_FITS = """
delete from config
where key = 'batch fits'
"""

PARAMETER_NAMES = names_in(MESSAGE_PARAMETERS)  # in `subscriptions`, `patterns` and `settings`
PARAMETER_COLUMNS = ", ".join(PARAMETER_NAMES)
PARAMETER_VALUES = ", ".join(map(":{}".format, PARAMETER_NAMES))
REPLACE_PARAMETERS = ", ".join(map("{0} = excluded.{0}".format, PARAMETER_NAMES))

# The subscriptions for a publication while patterns match its topic, which :patterns lists in
# JSON: one for each channel, to the topic itself or else to the first pattern by name.  (A column
# beside a min() is that of the row with the minimum: sqlite.org/lang_select.html 2.5.)
MATCHING_SUBSCRIPTIONS = f"""(
        select channel, {PARAMETER_COLUMNS}, ''
        from subscriptions
        where topic = :topic
        union all
        select channel, {PARAMETER_COLUMNS}, min(pattern)
        from json_each(:patterns) join patterns on pattern = value
        where not exists (
            select 1 from subscriptions where topic = :topic and channel = patterns.channel)
        group by channel
    ) as subscriptions"""

IS_FULL = """
    join channels on channels.name = subscriptions.channel
    left join settings on settings.channel = subscriptions.channel
where coalesce(settings.hlm, :hlm) > 0
    and ready + in_flight + delayed >= coalesce(settings.hlm, :hlm)"""

FULL_SUBSCRIBERS = f"""
select subscriptions.channel
from subscriptions {IS_FULL} and topic = :topic
order by subscriptions.channel
"""

FULL_MATCHING = f"""
select subscriptions.channel
from {MATCHING_SUBSCRIPTIONS} {IS_FULL}
order by subscriptions.channel
"""

MATCHING_CHANNELS = f"""
select channel
from {MATCHING_SUBSCRIPTIONS}
"""

# A channel's settings may have changed after its subscription was made.  A setting with which the
# copy would expire before it is ready gives way to what the subscription says.
COPY_DELAY = """coalesce(subscriptions.delay,
        case when subscriptions.linger > 0 and subscriptions.linger <= settings.delay
            then 0 else settings.delay end, 0)"""

COPY_LINGER = """coalesce(subscriptions.linger,
        case when settings.linger <= subscriptions.delay
            then 0 else settings.linger end, 0)"""

COPY_BLOCKED = IS_BLOCKED.format(channel="subscriptions.channel", group=":group")

COPIED_COLUMNS = """channel, priority, state, due_at, timeout, deliver, received, linger,
    expires_at, topic, type, dead, backoff, headers, group_key, blocked, body"""

COPIED_VALUES = f"""subscriptions.channel,
    coalesce(subscriptions.priority, settings.priority, 0),
    case when {COPY_DELAY} > 0 or {COPY_BLOCKED} then 2 else 0 end,
    :now + {COPY_DELAY} + {COPY_BLOCKED} * 1e12,
    coalesce(subscriptions.timeout, settings.timeout, {DEFAULTS["timeout"]}),
    coalesce(subscriptions.deliver, settings.deliver, 0),
    :now,
    {COPY_LINGER},
    case when {COPY_LINGER} > 0 then :now + {COPY_LINGER} else 0 end,
    :topic, :type,
    coalesce(subscriptions.dead, settings.dead, ''),
    coalesce(subscriptions.backoff, settings.backoff, ''),
    :headers, :group, {COPY_BLOCKED}, :body"""

GETS_COPY = f"""
    left join settings on settings.channel = subscriptions.channel
    left join channels on channels.name = subscriptions.channel
where (coalesce(settings.hlm, :hlm) = 0
        or coalesce(settings.hlm, :hlm) > coalesce(ready + in_flight + delayed, 0))
    and (:dedup is null or not {DEDUP_EXISTS})"""

PUBLISH_MESSAGE = f"""
insert into messages ({COPIED_COLUMNS})
select {COPIED_VALUES}
from subscriptions {GETS_COPY} and topic = :topic
order by subscriptions.channel
"""

PUBLISH_MATCHING = f"""
insert into messages ({COPIED_COLUMNS})
select {COPIED_VALUES}
from {MATCHING_SUBSCRIPTIONS} {GETS_COPY}
"""

# -- publications that are kept

# `seq` counts the publications of a topic, of which the first ones are deleted.
FIRST_SEQ = "(select seq from publications where topic = {topic} order by id limit 1)"
LAST_SEQ = "(select seq from publications where topic = {topic} order by id desc limit 1)"

# Of a row of `publications`; {0} is its table, with a dot.
TOO_OLD = f"""coalesce({{0}}seq <= {LAST_SEQ.format(topic=":topic")}
            - (select keep from retention where topic = :topic), 0)
        or coalesce({{0}}at <= :now - (select keep_for from retention where topic = :topic), 0)"""

KEEP_PUBLICATION = f"""
insert into publications (topic, seq, at, type, headers, group_key, body)
select :topic, 1 + coalesce({LAST_SEQ.format(topic=":topic")}, 0),
    :now, :type, :headers, :group, :body
from retention
where topic = :topic and coalesce(keep, 1) > 0 and (:dedup is null or not {DEDUP_EXISTS})
"""

TRIM_PUBLICATIONS = f"""
delete from publications
where id in (
    select id
    from (select id, seq, at from publications where topic = :topic order by id limit :trim)
    where {TOO_OLD.format("")}
)
"""

# The rows of the PUBLISH_MESSAGE (or PUBLISH_MATCHING, BACKFILL) just before: the ids of one
# AUTOINCREMENT insert follow each other.
PUBLISHED = """
select channel, id, state, due_at, expires_at
from messages
where id > last_insert_rowid() - changes() and id <= last_insert_rowid()
order by id
"""

# After PUBLISH_MESSAGE, unless the key was there; also when there are no subscriptions.
SAVE_TOPIC_DEDUP = f"""
insert into dedups (scope, key, until, result)
select :scope, :dedup, :now + :dedup_for, coalesce((
    select group_concat(id || ' ' || channel, char(10))
    from messages
    where id > last_insert_rowid() - changes() and id <= last_insert_rowid()), '')
where :dedup is not null and not {DEDUP_EXISTS}
on conflict (scope, key) do update set until = excluded.until, result = excluded.result
"""

# The same after KEEP_PUBLICATION, with the id of the publication, which is the newest of its topic.
SAVE_KEPT_DEDUP = SAVE_TOPIC_DEDUP.replace(
    "), '')",
    """), '') || coalesce((
        select char(10) || max(id) || ' '
        from publications
        where topic = :topic and exists (
            select 1 from retention where topic = :topic and coalesce(keep, 1) > 0)), '')""",
)

# -- consuming

TAKEN_TIMEOUT = "case when :timeout then :timeout else timeout end"  # to bind null is slow

NEXT_LEASE = "case when lease < :first_lease then :first_lease else lease + 1 end"

# The fields of a `Message` as it is delivered, and since when it has been ready, for NEXT_MESSAGE
# and SELECT_BATCH.
DELIVERED_COLUMNS = f"""id, channel, priority, {TAKEN_TIMEOUT}, deliver, delivered + 1,
    max(cast(:now - received as integer), 0), linger, topic, {NEXT_LEASE}, type, body,
    dead_from, dead_reason, error, backoff, dead_delivered, headers, group_key, due_at"""

BODY_COLUMN = Message._fields.index("body")  # among them
GROUP_COLUMN = Message._fields.index("group")
BODY_OF = operator.itemgetter(BODY_COLUMN)
TIMEOUT_OF = operator.itemgetter(Message._fields.index("timeout"))
DELIVER_OF = operator.itemgetter(Message._fields.index("deliver"))

SET_LEASED = f"""state = 1, due_at = :now + {TAKEN_TIMEOUT}, delivered = delivered + 1,
    lease = {NEXT_LEASE}, leased = 1"""

# Of a ready message.  A take passes over those that have expired and that ProcessDue has not come
# to; while there may be any, takes use BATCH_IDS, which looks at :n_expired more than it needs.
IS_ALIVE = "(expires_at = 0 or expires_at > :now)"

# One message of one channel, the usual case.
NEXT_MESSAGE = f"""
select {DELIVERED_COLUMNS}
from messages
where channel = :channel and state = 0 and {IS_ALIVE}
order by priority, id
limit 1
"""

LEASE_NEXT = f"""
update messages
set {SET_LEASED}
where id = (
    select id
    from messages
    where channel = :channel and state = 0 and {IS_ALIVE}
    order by priority, id
    limit 1
)
"""

# Whether as many messages of the channel {name} are in flight as may be.
IS_AT_LIMIT = """exists (
        select 1
        from settings
        where channel = {name} and max_in_flight > 0 and max_in_flight <= (
            select in_flight from channels where name = {name}))"""

# NEXT_MESSAGE and LEASE_NEXT right after a DELETE_LEASED, which must have deleted its message; and
# while the channel may be paused or limited: then :acks is 1 after a DELETE_LEASED, and else 0.
IS_OPEN = f"""not exists (select 1 from pauses where channel = :channel)
    and not {IS_AT_LIMIT.format(name=":channel")}"""
NEXT_IF_DELETED, LEASE_IF_DELETED, NEXT_IF_OPEN, LEASE_IF_OPEN = (
    statement.replace(IS_ALIVE, f"{IS_ALIVE} and {condition}")
    for condition in ("changes() = 1", f"changes() >= :acks and {IS_OPEN}")
    for statement in (NEXT_MESSAGE, LEASE_NEXT)
)

# For all other takes: of several messages, from several channels (:channels are lines), with
# `auto`, or while messages may have expired.  The messages are the first of the first channel
# that has one and is not paused.  They are sorted later, so that their bodies are not copied for
# that.  The limit without an order takes the rows as the subquery yields them: a sort would read
# them all.
CHOSEN_CHANNEL = f"""(
                        select name
                        from wanted
                        where not exists (select 1 from pauses where channel = name)
                            {{and_open}}
                            and exists (
                                select 1
                                from (
                                    select expires_at
                                    from messages
                                    where channel = name and state = 0
                                    order by priority, id
                                    limit :n + :n_expired
                                )
                                where {IS_ALIVE}
                            )
                        order by position
                        limit 1
                    )"""

MATCHING_IDS = f"""(
    with recursive wanted (position, name, rest) as (
        select 0, '', :channels || char(10)
        union all
        select position + 1, substr(rest, 1, instr(rest, char(10)) - 1),
            substr(rest, instr(rest, char(10)) + 1)
        from wanted
        where rest <> ''
    )
    select id
    from (
        select id, sum(size) over (
                order by priority, id rows unbounded preceding
            ) - size as size_before
        from (
            select id, priority, length(body) as size
            from messages
            where id in (
                select id
                from (
                    select id, priority, expires_at
                    from messages
                    where state = 0 and channel = {{chosen}}
                        and changes() >= :acks
                    order by priority, id
                    limit :n + :n_expired
                )
                where {IS_ALIVE}
                limit {{most}}
            )
        )
    )
    where size_before < :max_bytes
)"""

BATCH_IDS = MATCHING_IDS.format(chosen=CHOSEN_CHANNEL.format(and_open=""), most=":n")

# How many messages of a channel may begin their flight, up to :n.
ROOM = """coalesce(
            (select max_in_flight from settings where channel = {name} and max_in_flight > 0)
            - coalesce((select in_flight from channels where name = {name}), 0), :n)"""

# The same while a channel is limited: it is passed over while it has no room.
LIMITED_CHANNEL = CHOSEN_CHANNEL.format(and_open=f"and {ROOM.format(name='wanted.name')} > 0")
LIMITED_IDS = MATCHING_IDS.format(
    chosen=LIMITED_CHANNEL,
    most=f"min(:n, coalesce((select {ROOM.format(name='chosen.name')}"
    f" from {LIMITED_CHANNEL} as chosen), 0))",
)

# The other statements of the take use what this one finds.  A take that finds the same as the one
# before it, such as nothing in an empty channel, writes nothing.
PICK_BATCH = f"""
insert into picked (only, ids)
select 1, json_group_array(id)
from {BATCH_IDS}
where true
on conflict (only) do update set ids = excluded.ids where ids <> excluded.ids
"""

PICK_LIMITED = PICK_BATCH.replace(BATCH_IDS, LIMITED_IDS)

PICKED_IDS = "(select value from json_each((select ids from picked where only = 1)))"

SELECT_BATCH = f"""
select {DELIVERED_COLUMNS}
from messages
where id in {PICKED_IDS}
order by id
"""

LEASE_BATCH = f"""
update messages
set {SET_LEASED}
where id in {PICKED_IDS}
"""

DELETE_BATCH = f"""
delete from messages
where id in {PICKED_IDS}
"""

RESTORED_COLUMNS = """id, channel, priority, timeout, deliver, delivered, lease, received, linger,
    expires_at, topic, type, dead, backoff, unique_key, dead_from, dead_reason, dead_delivered,
    error, headers, group_key, body"""

# The whole rows, for RESTORE_MESSAGE.
SELECT_BATCH_ROWS = f"""
select {RESTORED_COLUMNS}
from messages
where id in {PICKED_IDS}
order by id
"""

RESTORE_MESSAGE = f"""
insert into messages (id, channel, priority, state, due_at, timeout, deliver, delivered, lease,
    received, linger, expires_at, topic, type, dead, backoff, unique_key, dead_from,
    dead_reason, dead_delivered, error, headers, group_key, blocked, body)
select :id, :channel, :priority, blocked * 2, :now + blocked * 1e12,
    :timeout, :deliver, :delivered, :lease + 1, :received, :linger, :expires_at, :topic,
    :type, :dead, :backoff,
    case when exists (
        select 1 from messages where channel = :channel and unique_key = :unique_key)
        then null else :unique_key end,
    :dead_from, :dead_reason, :dead_delivered, :error, :headers, :group_key, blocked, :body
from (
    select {IS_BLOCKED_AGAIN.format(channel=":channel", group=":group_key", id=":id")}
        and :dead_from = '' as blocked
)
"""

# After RESTORE_MESSAGE, as the trigger of a message that has moved does.
BLOCK_LATER = """
update messages
set blocked = 1, state = 2, leased = 0, due_at = due_at + 1e12
where :group_key <> '' and :dead_from = '' and channel = :channel and group_key = :group_key
    and group_key <> '' and dead_from = '' and blocked = 0 and state <> 1 and id > :id
"""

UNDO_TAKE = """
update messages
set state = 0, due_at = :now, delivered = delivered - 1, leased = 0
where id = :id and lease = :lease and leased = 1
"""

# -- acknowledging

# The message of a call.  With :expected_channel, only if it is in that channel: its id alone is not
# enough.  With :lease, only if it has not been delivered again.
IS_MESSAGE = "id = :id and channel = coalesce(:expected_channel, channel)"
IS_DELIVERY = f"{IS_MESSAGE} and lease = coalesce(:lease, lease)"

LEASE_STATE = f"""
select lease, leased, channel, group_key
from messages
where {IS_MESSAGE}
"""

CHANNEL_OF_MESSAGE = """
select id, channel, group_key
from messages
where id = :id
"""

DUE_TIMES = """
select channel, state, due_at, expires_at
from messages
where id = :id
"""

# One that has timed out is in flight again, if there is room.
TOUCH_MESSAGE = f"""
update messages
set state = 1, due_at = :now + coalesce(:timeout, timeout)
where {IS_DELIVERY} and leased = 1
    and (state = 1 or not {IS_AT_LIMIT.format(name="messages.channel")})
"""

DELETE_MESSAGE = """
delete from messages
where id = :id
"""

DELETE_LEASED = f"""
delete from messages
where {IS_DELIVERY}
"""

# As DELETE_LEASED does, for :messages, a JSON object: each id has its lease (or null), or an array
# of the lease and the expected channel, which takes twice the time.
WANTED = """
from (
    select cast(key as integer) as wanted_id,
        case type when 'array' then json_extract(value, '$[0]') else value end as wanted_lease,
        case type when 'array' then json_extract(value, '$[1]') end as wanted_channel
    from json_each(:messages)
) cross join messages on id = wanted_id and channel = coalesce(wanted_channel, channel)"""

FIND_WANTED = f"""
select id, channel, group_key, lease = coalesce(wanted_lease, lease) {WANTED}
"""

DELETE_WANTED = f"""
delete from messages
where id in (select id {WANTED} where lease = coalesce(wanted_lease, lease))
"""

# -- request and reply

# A reply, if the message was called; then it is deleted.
ADD_REPLY = f"""
insert into replies (id, type, body, until)
select id, :type, :body, :now + :ttl
from messages
where {IS_DELIVERY}
    and instr(headers, '{REPLY_LINE.rstrip()} ' || char(13)) > 0
"""

DELETE_REPLIED = """
delete from messages
where id = :id and changes() = 1
"""

READ_REPLY = """
select type, body
from replies
where id = :id
"""

CLAIM_REPLY = """
update replies
set body = :body
where id = :id
"""

CALLED_MESSAGE = """
select dead_reason, error
from messages
where id = :id
"""

DELETE_CALLED = """
delete from messages
where id = :id and channel = :channel and delivered = 0 and dead_from = ''
"""

# The n-th step of a backoff is in its n-th BACKOFF_WIDTH characters; the last one repeats.
BACKOFF_STEP = f"""cast(substr(backoff, 1 + {BACKOFF_WIDTH} * (min(max(delivered, 1),
        length(backoff) / {BACKOFF_WIDTH}) - 1), {BACKOFF_WIDTH}) as integer)"""

RELEASE_MESSAGE = f"""
update messages
set leased = 0,
    error = case when :reason = '' then error else :reason end,
    state = case when coalesce(:delay, {BACKOFF_STEP}) > 0 then 2 else 0 end,
    due_at = :now + coalesce(:delay, {BACKOFF_STEP})
where {IS_DELIVERY} and leased = 1 and (deliver = 0 or delivered < deliver)
"""

RELEASE_UNCOUNTED = f"""
update messages
set leased = 0,
    delivered = delivered - 1,
    error = case when :reason = '' then error else :reason end,
    state = case when coalesce(:delay, 0) > 0 then 2 else 0 end,
    due_at = :now + coalesce(:delay, 0)
where {IS_MESSAGE} and leased = 1 and lease = :lease
"""

EXHAUST_RELEASED = f"""
update messages
set state = 3, dead_reason = 'deliver', error = case when :reason = '' then error else :reason end
where {IS_DELIVERY} and leased = 1 and deliver > 0 and delivered >= deliver
"""

REJECT_MESSAGE = f"""
update messages
set state = 3, dead_reason = 'reject', error = case when :reason = '' then error else :reason end
where {IS_DELIVERY} and (:lease is null or leased = 1)
"""

# For a message that moves to the channel {target}: its key, unless another message there has it.
# The rows of a statement are updated one after the other, so of two with one key one keeps it.
MOVED_KEY = """case when unique_key is not null and not exists (
        select 1 from messages as others
        where others.channel = {target} and others.unique_key = messages.unique_key)
    then unique_key end"""

# BURY_DEAD: a message in state 3 goes to its dead channel, or is deleted if it has no other.
DEAD_COUNTS = """
select dead, count(*)
from messages
where state = 3 and state > 2 and dead <> '' and dead <> channel
group by dead
"""

MOVE_DEAD = f"""
update messages
set channel = dead, dead_from = channel, state = 0, due_at = :now, delivered = 0, leased = 0,
    blocked = 0,
    dead_delivered = delivered, linger = 0, expires_at = 0,
    unique_key = {MOVED_KEY.format(target="messages.dead")}
where state = 3 and state > 2 and dead <> '' and dead <> channel
"""

DELETE_DEAD = """
delete from messages
where state = 3 and state > 2
"""

# A piece of a redrive: ready messages in their order, from where the piece before ended.
REDRIVE_PIECE = """
select priority, id
from messages
where channel = :channel and state = 0 and id <= :newest
    and (priority, id) > (:after_priority, :after_id)
order by priority, id
limit :n
"""

REDRIVE_IDS = f"""
    select id
    from messages
    where id in (select id from ({REDRIVE_PIECE}))
        and (:to is not null or dead_from <> '') and {IS_ALIVE}
"""

REDRIVE_COUNTS = f"""
select coalesce(:to, dead_from), count(*)
from messages
where id in ({REDRIVE_IDS})
group by 1
"""

REDRIVEN_BLOCKED = IS_BLOCKED_AGAIN.format(
    channel="coalesce(:to, messages.dead_from)", group="messages.group_key", id="messages.id"
)

SET_REDRIVEN = f"""channel = coalesce(:to, dead_from), delivered = 0, leased = 0,
    state = case when {REDRIVEN_BLOCKED} then 2 else 0 end,
    due_at = :now + {REDRIVEN_BLOCKED} * 1e12, blocked = {REDRIVEN_BLOCKED},
    unique_key = {MOVED_KEY.format(target="coalesce(:to, messages.dead_from)")},
    dead_from = '', dead_reason = '', dead_delivered = 0"""

REDRIVE_MESSAGES = f"""
update messages
set {SET_REDRIVEN}
where id in ({REDRIVE_IDS})
"""

# -- changing: a message that waits

WAITING_MESSAGE = f"""
select channel, state, delivered, dead_from, blocked
from messages
where {IS_MESSAGE}
"""

REDRIVE_MESSAGE = f"""
update messages
set {SET_REDRIVEN}
where {IS_MESSAGE} and state <> 1
    and (:to is not null or dead_from <> '') and channel <> coalesce(:to, dead_from)
"""

# Without :delay it stays ready or delayed, until when it was; if it is blocked, it stays so.
CHANGE_MESSAGE = f"""
update messages
set priority = coalesce(:priority, priority),
    timeout = coalesce(:timeout, timeout),
    deliver = coalesce(:deliver, deliver),
    dead = coalesce(:dead, dead),
    state = case when :delay is null or blocked then state when :delay > 0 then 2 else 0 end,
    due_at = coalesce(:now + :delay + blocked * 1e12, due_at)
where {IS_MESSAGE} and state <> 1
    and (coalesce(:deliver, 0) = 0 or delivered < :deliver)
    and (expires_at = 0 or coalesce(:delay, 0) = 0 or :now + :delay < expires_at)
"""

DRAIN_READY = """
delete from messages
where id in (
    select id
    from messages
    where channel = :channel and state = 0 and id <= :newest
    limit :n
)
"""

DRAIN_HIDDEN = DRAIN_READY.replace("state = 0", "state > 0")

DELETE_DEDUPS = """
delete from dedups
where (scope, key) in (
    select scope, key
    from dedups
    where scope in (:scope, :batch_scope) and cast(result as integer) <= :newest_key
    limit :n
)
"""

# -- timers: the steps of PROCESS_DUE, in this order; each looks at one piece of one channel

# 1. Expired messages and those that timed out in their last delivery die.
EXPIRED_IDS = """
    select id
    from messages
    where channel = :channel and expires_at > 0 and state <> 1 and expires_at <= :now
    order by expires_at
    limit :n
"""

DELETE_EXPIRED = f"""
delete from messages
where id in ({EXPIRED_IDS}) and (dead = '' or dead = channel)
"""

EXPIRE_WAITING = f"""
update messages
set state = 3, dead_reason = 'linger'
where id in ({EXPIRED_IDS}) and dead <> '' and dead <> channel
"""

DUE_IDS = """
    select id
    from messages
    where channel = :channel and state > 0 and due_at <= :now
    order by due_at, priority, id
    limit :n
"""

HAS_EXPIRED = "state = 1 and expires_at > 0 and expires_at <= :now"
IS_EXHAUSTED = "state = 1 and deliver > 0 and delivered >= deliver"
BACKS_OFF = f"state = 1 and backoff <> '' and due_at + {BACKOFF_STEP} > :now"

EXPIRE_TIMED_OUT = f"""
update messages
set state = 3, dead_reason = 'linger'
where id in ({DUE_IDS}) and {HAS_EXPIRED}
"""

EXHAUST_TIMED_OUT = f"""
update messages
set state = 3, dead_reason = 'deliver'
where id in ({DUE_IDS}) and {IS_EXHAUSTED}
"""

# 2. (BURY_DEAD.)  3. Messages that timed out and have a backoff are delayed.  From here on the
# piece may have come to include messages that the steps before have not seen.
BACK_OFF_TIMED_OUT = f"""
update messages
set state = 2, due_at = due_at + {BACKOFF_STEP}
where id in ({DUE_IDS}) and {BACKS_OFF} and not ({HAS_EXPIRED}) and not ({IS_EXHAUSTED})
"""

# 4. The other timed-out and delayed messages are counted and become ready.
COUNT_DUE = f"""
select count(*), coalesce(sum(state = 1), 0)
from messages
where id in ({DUE_IDS})
    and not ({HAS_EXPIRED}) and not ({IS_EXHAUSTED}) and not ({BACKS_OFF})
"""

MAKE_DUE_READY = f"""
update messages
set state = 0
where id in ({DUE_IDS})
    and not ({HAS_EXPIRED}) and not ({IS_EXHAUSTED}) and not ({BACKS_OFF})
"""

# 5. The next due time of the channel is read.
NEXT_DUE = """
select min(due_at)
from messages
where channel = :channel and state > 0
"""

NEXT_EXPIRY = """
select min(expires_at)
from messages
where channel = :channel and expires_at > 0 and state <> 1
"""

# At the start: the next due time of each channel, null if it has none.
NEXT_BY_CHANNEL = f"""
select name,
    ({NEXT_DUE.replace(":channel", "name")}) as due_at,
    ({NEXT_EXPIRY.replace(":channel", "name")}) as expires_at
from channels
"""

# One message, in place of EXPIRE_WAITING.
EXPIRE_MESSAGE = """
update messages
set state = 3, dead_reason = 'linger'
where id = :id and expires_at > 0 and state <> 1 and expires_at <= :now
"""

# A piece of EndPausesAndKeys: pauses end, and old dedup keys and replies are deleted.
ENDED_PAUSES = """
select pauses.channel, coalesce(ready, 0)
from pauses left join channels on channels.name = pauses.channel
where until <= :now
order by pauses.channel
limit :n
"""

END_PAUSES = """
delete from pauses
where channel in (
    select channel
    from pauses
    where until <= :now
    order by channel
    limit :n
)
"""

DELETE_OLD_DEDUPS = """
delete from dedups
where (scope, key) in (
    select scope, key
    from dedups
    where until <= :now
    limit :n
)
"""

DELETE_OLD_REPLIES = """
delete from replies
where id in (
    select id
    from replies
    where until <= :now
    limit :n
)
"""

NEXT_PAUSE = """
select min(until)
from pauses
"""

# ---------------------------------------------------------------------------------------------
# Directory: the SQL statements of channels and topics, of inspection, and of clusters.  The same
# rules hold.
# ---------------------------------------------------------------------------------------------

IS_SUBSCRIBED = "exists (select 1 from subscriptions where topic = :topic and channel = :channel)"

SUBSCRIBE = f"""
insert into subscriptions (topic, channel, {PARAMETER_COLUMNS}, created)
select :topic, :channel, {PARAMETER_VALUES}, :now
where ({IS_SUBSCRIBED}
    or (select count(*) from subscriptions where topic = :topic) < :max_subscribers)
on conflict (topic, channel) do update set {REPLACE_PARAMETERS}, created = excluded.created
"""

# After CHECK_BACKFILL_FITS.
SUBSCRIBE_IF_IT_FITS = SUBSCRIBE.replace("\non conflict", f"\n    and {BATCH_FITS}\non conflict")

SUBSCRIBE_PATTERN = f"""
insert into patterns (pattern, channel, {PARAMETER_COLUMNS}, created)
select :pattern, :channel, {PARAMETER_VALUES}, :now
where exists (select 1 from patterns where pattern = :pattern and channel = :channel)
    or (select count(*) from patterns) < :max_patterns
on conflict (pattern, channel) do update set {REPLACE_PARAMETERS}, created = excluded.created
"""

UNSUBSCRIBE = """
delete from subscriptions
where topic = :topic and channel = :channel
"""

UNSUBSCRIBE_PATTERN = """
delete from patterns
where pattern = :pattern and channel = :channel
"""

SET_RETENTION = """
insert into retention (topic, keep, keep_for)
select :topic, :keep, :keep_for
where exists (select 1 from retention where topic = :topic)
    or (select count(*) from retention) < :max_topics
on conflict (topic) do update set keep = excluded.keep, keep_for = excluded.keep_for
"""

FORGET_RETENTION = """
delete from retention
where topic = :topic and keep = 0 and not exists (
    select 1 from publications where topic = :topic)
"""

# Those with publications to be deleted: the first one is the oldest, and has the lowest number.
TOPICS_TO_TRIM = f"""
select topic
from retention
where keep = 0
    or (select at from publications where topic = retention.topic order by id limit 1)
        <= :now - keep_for
    or {FIRST_SEQ.format(topic="retention.topic")}
        <= {LAST_SEQ.format(topic="retention.topic")} - keep
"""

ALL_RETENTION = """
select topic, keep, keep_for
from retention
"""

ALL_PATTERNS = """
select pattern, channel
from patterns
order by pattern
"""

PATTERNS_OF_CHANNEL = """
select pattern
from patterns
where channel = :channel
order by pattern
"""

SETTING_NAMES = (*PARAMETER_NAMES, "hlm", "max_in_flight")
SETTING_COLUMNS = ", ".join(SETTING_NAMES)
SETTING_VALUES = ", ".join(map(":{}".format, SETTING_NAMES))
REPLACE_SETTINGS = ", ".join(map("{0} = excluded.{0}".format, SETTING_NAMES))

SET_SETTINGS = f"""
insert into settings (channel, {SETTING_COLUMNS})
values (:channel, {SETTING_VALUES})
on conflict (channel) do update set {REPLACE_SETTINGS}
"""

# Only those that are given.
CHANGE_SETTINGS = SET_SETTINGS.replace(
    REPLACE_SETTINGS, ", ".join(map("{0} = coalesce(excluded.{0}, {0})".format, SETTING_NAMES))
)

CLEAR_RETENTION = """
update retention
set keep = 0, keep_for = null
where topic = :topic
"""

CLEAR_SETTINGS = """
delete from settings
where channel = :channel
"""

SETTINGS_OF_CHANNEL = f"""
select {SETTING_COLUMNS}
from settings
where channel = :channel
"""

ALL_SETTINGS = f"""
select channel, {SETTING_COLUMNS}
from settings
"""

PAUSE = """
insert into pauses (channel, until)
values (:channel, :until)
on conflict (channel) do update set until = excluded.until
"""

RESUME = """
delete from pauses
where channel = :channel
"""

ALL_PAUSES = """
select channel, until
from pauses
"""

CHANNEL_COUNTS = """
select ready, in_flight, delayed, blocked
from channels
where name = :channel
"""

# Messages of priority 0 are in the order of their arrival; the others have an index by age.
OLDEST_OF = """(
    select min(received)
    from (
        select received
        from (
            select received
            from messages
            where channel = {name} and state = 0 and priority = 0
            order by id
            limit 1
        )
        union all
        select min(received)
        from messages
        where channel = {name} and state = 0 and priority <> 0
    )
)"""

OLDEST_READY = f"""
select {OLDEST_OF.format(name=":channel")}
"""

CHANNELS_AFTER = f"""
select name, ready, case when :by_age then {OLDEST_OF.format(name="name")} end,
    in_flight, delayed - blocked, blocked
from channels
where name > :after
order by name
limit :n
"""

SUBSCRIBED_AFTER = """
select channel
from (select channel from subscriptions where channel > :after order by channel limit :n)
union
select channel
from (select channel from patterns where channel > :after order by channel limit :n)
order by channel
limit :n
"""

CHANNEL_NAMES = """
select name
from channels
union
select channel
from subscriptions
union
select channel
from patterns
"""

TOPIC_NAMES = """
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

CHANNELS_OF_PATTERNS = """
select pattern, channel
from json_each(:patterns) join patterns on pattern = value
order by pattern, channel
"""

KEPT_COUNTS = f"""
select topic, 1 + coalesce(
    {LAST_SEQ.format(topic="retention.topic")}
        - {FIRST_SEQ.format(topic="retention.topic")}, -1)
from retention
order by topic
"""

SCHEDULE_COUNTS = """
select count(*), coalesce(sum(last_error <> ''), 0)
from schedules
"""

# -- kept publications: reading them, and copying them to a new subscriber

IS_KEPT = f"""{{0}}topic = :topic and {{0}}id > :after and {{0}}at > :now - :seconds
    and not ({TOO_OLD})"""

# The next :n of several topics, which :topics lists in JSON.  Only the :n topics whose own next one
# comes first can have any of them.
KEPT_PUBLICATIONS = f"""
select id, topic, max(cast(:now - at as integer), 0), type, headers,
    substr(body, 1, :preview_bytes + 1)
from publications
where id in (
    select id
    from (
        select value as topic
        from json_each(:topics)
        order by coalesce((
            select id
            from publications
            where {IS_KEPT.format("").replace(":topic", "value")}
            order by id
            limit 1), {MAX_INTEGER})
        limit :n
    ) as nearest
        cross join publications on id in (
            select id
            from publications
            where {IS_KEPT.format("").replace(":topic", "nearest.topic")}
            order by id
            limit :n)
    order by id
    limit :n
)
order by id
"""

# An id up to which all publications are older than :seconds.  Ids are in the order of time, give or
# take :commit_time, so a binary search finds it and need not read all.
IS_OLD = """coalesce((
        select at from publications where id >= (low + high) / 2 order by id limit 1
    ) <= :now - :seconds - :commit_time, 0)"""

OLD_PUBLICATIONS = f"""
with recursive halves (low, high) as (
    select 0, coalesce(max(id), 0) + 1
    from publications
    union all
    select case when {IS_OLD} then (low + high) / 2 else low end,
        case when {IS_OLD} then high else (low + high) / 2 end
    from halves
    where high - low > 1
)
select max(low)
from halves
"""

# What is to be copied to a new subscriber; the count ends above :max_copies, which is refused.
KEPT_TOTALS = f"""
select count(*), coalesce(sum(size), 0)
from (
    select length(body) as size
    from publications
    where {IS_KEPT.format("")} and not {IS_SUBSCRIBED}
    limit :max_copies + 1
)
"""

# Before those copies, which fit into the channel all or not at all.
CHECK_BACKFILL_FITS = f"""
insert into config (key, value)
select 'batch fits', case when {IS_SUBSCRIBED} then 'nothing' else 'all' end
from (select coalesce((select hlm from settings where channel = :channel), :hlm) as hlm)
where hlm = 0 or {IS_SUBSCRIBED} or hlm >= coalesce(
        (select ready + in_flight + delayed from channels where name = :channel), 0)
    + (select count(*) from publications where {IS_KEPT.format("")})
"""

# Of the copies in one statement that are of a group, the first may be ready.
BACKFILL_BLOCKED = f"""({IS_BLOCKED.format(channel="subscriptions.channel", group="kept.group_key")}
        or kept.group_key <> '' and kept.id not in (
            select min(id) from publications where {IS_KEPT.format("")} group by group_key))"""

BACKFILL = f"""
insert into messages ({COPIED_COLUMNS})
select {
    COPIED_VALUES.replace(COPY_BLOCKED, BACKFILL_BLOCKED)
    .replace(":type", "kept.type")
    .replace(":headers", "kept.headers")
    .replace(":group", "kept.group_key")
    .replace(":body", "kept.body")
}
from publications as kept
    cross join subscriptions on subscriptions.topic = :topic and subscriptions.channel = :channel
    left join settings on settings.channel = :channel
where {IS_KEPT.format("kept.")}
    and exists (select 1 from config where key = 'batch fits' and value = 'all')
order by kept.id
"""

# -- inspection

# The fields of a `Message` that is not delivered, and its state, around the column for its body.
BEFORE_BODY = """id, channel, priority, timeout, deliver, delivered,
    max(cast(:now - received as integer), 0), linger, topic, lease, type"""

AFTER_BODY = """dead_from, dead_reason, error, backoff, dead_delivered, headers, group_key, dead,
    case when state = 2
        then max(cast(due_at - blocked * 1e12 - :now + 0.999 as integer), 0) else 0 end,
    coalesce(unique_key, ''),
    case when state = 1 then max(cast(due_at - :now + 0.999 as integer), 0) else 0 end,
    state + blocked"""

# One byte more than :preview_bytes shows that a body is longer.
PREVIEW_COLUMNS = f"""{BEFORE_BODY}, substr(body, 1, :preview_bytes + 1), {AFTER_BODY}"""

READ_MESSAGE = f"""
select {BEFORE_BODY}, body, {AFTER_BODY}
from messages
where id = :id
"""

LIST_READY = f"""
select {PREVIEW_COLUMNS}
from messages
where channel = :channel and state = 0
    and (:after is null or (priority, id) > (select priority, id from messages where id = :after))
order by priority, id
limit :n
"""

# With up to MAX_SORTED messages, of any state or one :state, whose ids this sorts.
LIST_FEW = f"""
select {PREVIEW_COLUMNS}
from messages
where id in (
    select id
    from (
        select id, 0 as listed
        from messages
        where channel = :channel and state = 0 and :state is null
        union all
        select id, state + blocked
        from messages
        where channel = :channel and state > 0
    )
    where id > coalesce(:after, 0) and listed = coalesce(:state, listed)
    order by id
    limit :n
)
order by id
"""

# With more: looks at the messages of all channels, of which many are of this one.
LIST_MANY = f"""
select {PREVIEW_COLUMNS}
from messages
where channel = :channel and state + blocked = coalesce(:state, state + blocked)
    and id > coalesce(:after, 0)
order by id
limit :n
"""

# The pattern of LOOK_UPS: what events show of messages, and the channels where these are then.
EVENT_ROWS = f"""
select {BEFORE_BODY}, substr(body, 1, :event_bytes + 1), {AFTER_BODY}, :event_bytes, {{target}}
from messages
where ({{watched}}) and {{condition}}
"""

# Whether somebody listens to the channel {}; :watched has a channel on each line.
IS_WATCHED = "instr(:watched, char(10) || {} || char(10)) > 0"

# Dead letters of one reason; ids are in the order of the posts.
OLDEST_DEAD = f"""
select {PREVIEW_COLUMNS}
from messages
where dead_reason = :reason and dead_reason <> '' and id > :after
order by id
limit :n
"""

NEWEST_DEAD = OLDEST_DEAD.replace("id > :after", "id < :after").replace(
    "order by id", "order by id desc"
)

# Of a page of channels.
MESSAGE_TOTALS = """
select coalesce(sum(ready), 0), coalesce(sum(in_flight), 0), coalesce(sum(delayed), 0),
    coalesce(sum(urgent), 0), coalesce(sum(niced), 0), count(*), max(name)
from (
    select name, ready, in_flight, delayed, urgent, niced
    from channels
    where name > :after
    order by name
    limit :n
)
"""

SUBSCRIPTION_TOTALS = """
select count(distinct topic), count(*) + (select count(*) from patterns)
from subscriptions
"""

NEWEST_MESSAGE = """
select max(id)
from messages
"""

PUBLISHED_AFTER = """
select id, topic
from publications
where id > :after
order by id
limit :n
"""

NEWEST_PUBLICATION = """
select coalesce(max(id), 0)
from publications
"""

# -- several servers on one cluster

# The version of SQLite in the nodes, and how many tables and other objects the database has.
IDENTIFY = """
select sqlite_version(), (select count(*) from sqlite_master where name not glob 'sqlite_*')
"""

# Which kinds of rows there are, but those that a server makes by itself.
FIND_STORED = """
select 'messages' where exists (select 1 from channels)
union all
select 'subscriptions' where exists (select 1 from subscriptions)
union all
select 'settings' where exists (select 1 from settings)
union all
select 'pauses' where exists (select 1 from pauses)
union all
select 'patterns' where exists (select 1 from patterns)
union all
select 'schedules' where exists (select 1 from schedules)
union all
select 'publications' where exists (select 1 from publications)
    or exists (select 1 from retention)
union all
select 'replies' where exists (select 1 from replies)
union all
select 'dedup keys' where exists (select 1 from dedups)
"""

COUNT_MESSAGES = """
select count(*)
from messages
"""

DATABASE_SIZE = """
select page_count * page_size
from pragma_page_count, pragma_page_size
"""

# The first statement of each transaction: it fails, and all others with it, unless this is the
# session's next one.  So each is executed once at most, and never after a later one, however often
# and late it arrives.
TAKE_TURN = """
insert into sessions (name, turn, at)
values (:session,
    (select turn + 1 from sessions where name = :session and turn = :turn - 1), :now)
on conflict (name) do update set turn = excluded.turn, at = max(at, excluded.at)
"""

GET_TURN = """
select turn
from sessions
where name = :session
"""

# A new session has turn 0 until its first transaction.
BEGIN_SESSION = """
insert into sessions (name, turn, at)
select :session, 0, coalesce(max(at), 0)
from sessions
where true
on conflict (name) do nothing
"""

FORGET_SESSIONS = """
delete from sessions
where at < (select max(at) from sessions) - :ttl
"""

CLEAR_SESSIONS = """
delete from sessions
"""

END_SESSION = """
delete from sessions
where name = :session
"""

COUNT_SERVING = """
select count(*)
from sessions
where turn > 0
"""

# How often settings, pauses, patterns or retention have changed, how far broker time is, which new
# sessions wait for it, and the newest publication.
LOOK_AROUND = """
select (select value from config where key = 'changes'), max(at),
    group_concat(case when turn = 0 then name end, ' '), (select max(id) from publications)
from sessions
"""

READY_CHANNELS = """
select name, ready
from channels
where ready > 0 and name in (select value from json_each(:names))
    and not exists (select 1 from pauses where channel = name)
    and not exists (
        select 1
        from settings
        where channel = name and max_in_flight > 0 and max_in_flight <= in_flight)
"""

DUE_SOON = f"""
select name, due_at, expires_at
from ({NEXT_BY_CHANNEL})
where due_at <= :soon or expires_at <= :soon
"""


# ---------------------------------------------------------------------------------------------
# Counters: what has happened to messages since the start.  Operations count after their commit;
# what is rolled back, or repeated with a key, is not counted.
# ---------------------------------------------------------------------------------------------

# What may happen to a message, each a counter of every channel.
EVENTS = {
    "posted": "Messages added, by a post or as the copy of a publication.",
    "delivered": "Deliveries; one message may have several.",
    "deleted": "Messages deleted by a client, by a drain, or as they were delivered.",
    "released": "Deliveries that a client gave back.",
    "rejected": "Messages that a client gave up.",
    "timed_out": "Deliveries that were not deleted in time.",
    "expired": "Messages whose lingering ended.",
    "dead_lettered": "Messages moved from this channel to its dead channel.",
    "redriven": "Dead letters moved from this channel back to where they came from.",
}
# Upper bounds of histograms
SHORT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
LONG_SECONDS = (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 86_400.0)
AMOUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)
FAILURES = ("released", "rejected", "timed_out")  # of deliveries
SAMPLED = ("posted", "delivered", "deleted", "failed", "published", "ready", "in-flight")

Method = TypeVar("Method", bound=Callable[..., Any])


def locked(method: Method) -> Method:
    """Lets a method run under the `_lock` of its object, an RLock that is never nested.

    For locks that callers of a broker or a client share with other threads: in a caller's thread
    signal handlers may raise.  Until Python 3.10 they may do so after the last step of a `with`
    and before its release; then this releases the lock.
    """

    @functools.wraps(method)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            with self._lock:
                return method(self, *arguments, **options)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # released already, as it should be
                self._lock.release()
            raise

    return cast(Method, run)


class EventCounts(dict[str, dict[str, int]]):
    """How often each of EVENTS has happened in each channel: `counts[channel][event]`.

    The first channels, up to a limit, have counts of their own; the others share those of the
    channel "", which is no channel's name.  The committer thread counts, and takes off deliveries
    that were undone; any may add a channel.
    """

    def __init__(self, max_channels: int) -> None:
        super().__init__({"": dict.fromkeys(EVENTS, 0)})
        self._max_channels = max_channels
        self._lock = threading.RLock()  # guards what was shown
        self._shown: dict[str, dict[str, int]] = {}

    def __missing__(self, channel: str) -> dict[str, int]:
        if len(self) > self._max_channels:
            return self[""]
        return self.setdefault(channel, dict.fromkeys(EVENTS, 0))

    def label(self, channel: str) -> str:
        """The channel, or "" if it is counted together with others."""
        return channel if self[channel] is not self[""] else ""

    def totals(self, channel: str) -> Optional[dict[str, int]]:
        """What has happened in a channel, by the first names of SAMPLED; None if it shares its
        counts with others.  For any thread."""
        counts = self.get(channel)
        if counts is None:
            if len(self) > self._max_channels:
                return None
            counts = dict.fromkeys(EVENTS, 0)
        totals = {event: counts[event] for event in ("posted", "delivered", "deleted")}
        totals["failed"] = sum(counts[event] for event in FAILURES)
        return totals

    def total(self, event: str) -> int:
        """How often an event has happened in all channels.  For any thread."""
        return sum(counts[event] for counts in self.copy().values())

    @locked
    def by_channel(self) -> dict[str, dict[str, int]]:
        """The counts of each channel, for any thread.

        They never decrease: after an undo each stays until it has been reached again.
        """
        for channel, counts in self.copy().items():
            shown = self._shown.setdefault(channel, counts.copy())
            for event, count in counts.items():
                if count > shown[event]:
                    shown[event] = count
        return {channel: shown.copy() for channel, shown in self._shown.items()}


class Histogram:
    """How many values were at most each of some bounds, and their sum.

    `observe(value)` only notes a value, since it is called for each message; `fold`, for any
    thread, counts all that were noted at once.
    """

    __slots__ = ("_lock", "_noted", "bounds", "counts", "observe", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # not cumulative; the last is of larger values
        self.sum = 0.0
        self._lock = threading.RLock()  # guards both
        self._noted: collections.deque[float] = collections.deque(maxlen=MAX_NOTED)
        self.observe = self._noted.append

    @locked
    def fold(self) -> None:
        """Counts the values noted since the last time."""
        first = itertools.islice(iter(self._noted.popleft, None), len(self._noted))
        values = sorted(first)
        counted = 0
        for position, bound in enumerate(self.bounds):
            end = bisect.bisect_right(values, bound)
            self.counts[position] += end - counted
            counted = end
        self.counts[-1] += len(values) - counted
        self.sum += sum(values)


class Flight(NamedTuple):
    """A message that this server has delivered, and that may still be in flight."""

    channel: str
    began: float  # broker time
    until: float
    lease: int
    holder: str  # name or address of the consumer
    group: str = ""


class Flights:
    """The latest flights by message id, so that most deletes need no look-up of the channel.  The
    committer thread writes; any may read.

    A flight that ends with its timeout stays until there are too many: then the older half goes.
    """

    def __init__(self) -> None:
        self._recent: dict[int, Flight] = {}
        self._older: dict[int, Flight] = {}

    def latest(self) -> dict[int, Flight]:
        """Where new flights are put, up to MAX_BATCH at once."""
        if len(self._recent) >= MAX_FLIGHTS // 2:
            self._older, self._recent = self._recent, {}
        return self._recent

    def pop(self, id: int) -> Optional[Flight]:
        """Forgets the delivery of a message, and returns it if it was known."""
        return self._recent.pop(id, None) or self._older.pop(id, None)

    def touch(self, id: int, until: float) -> None:
        """Notes that a flight ends later, or earlier, than at first."""
        flight = self.pop(id)
        if flight is not None:
            self.latest()[id] = flight._replace(until=until)

    def holder_of(self, id: int, lease: int) -> str:
        """The consumer to which a delivery went; empty if that is not known."""
        flight = self._recent.get(id) or self._older.get(id)
        return flight.holder if flight is not None and flight.lease == lease else ""

    def find(self, id: int, now: float) -> Optional[Flight]:
        """The flight of a message that is in flight for certain; None if it may be elsewhere."""
        flight = self._recent.get(id) or self._older.get(id)
        return flight if flight is not None and now < flight.until else None


class History:
    """Totals of the last hour: a point for each SAMPLE_INTERVAL, of what has happened since the
    point before, and of the messages that there were."""

    def __init__(self, now: float) -> None:
        self._lock = threading.RLock()  # guards all below
        self._points: collections.deque[tuple[float, Sequence[int]]] = collections.deque(
            maxlen=HISTORY_SECONDS // SAMPLE_INTERVAL
        )
        self._totals = [0] * len(SAMPLED)
        self._due = now + SAMPLE_INTERVAL

    def is_due(self, now: float) -> bool:
        """Whether it is time for the next point."""
        return now >= self._due

    @locked
    def add(self, now: float, totals: Sequence[int], ready: int, in_flight: int) -> None:
        """Adds the next point, if it is due; `totals` since the start, of the others of SAMPLED.

        After a suspend there is one point for all that time.
        """
        if not self.is_due(now):
            return
        self._due += (now - self._due) // SAMPLE_INTERVAL * SAMPLE_INTERVAL + SAMPLE_INTERVAL
        amounts = [total - before for total, before in zip(totals, self._totals)]
        self._points.append((now, (*amounts, ready, in_flight)))
        self._totals = list(totals)

    @locked
    def since(self, moment: float) -> list[tuple[float, Sequence[int]]]:
        """The points after a moment: when each was added, and the values of SAMPLED."""
        return [point for point in self._points if point[0] > moment]


# ---------------------------------------------------------------------------------------------
# Commits: operations, and the thread that commits them in groups.  Knows neither SQLite nor
# queues: a store (below) runs the statements, and each kind of operation knows what they mean.
#
# Threads `submit` operations.  The committer thread runs all that are pending in one transaction,
# commits once, runs the commit callbacks in order, and then the done callbacks, which send the
# responses.  The busier the server is, the more operations share a commit.
# ---------------------------------------------------------------------------------------------

Parameters = Union[Mapping[str, object], Sequence[Any]]
Run = tuple[str, Mapping[str, Any]]  # a statement and its parameters
T = TypeVar("T")

FORKED = "this process was forked from the one that has the server: use a Client here"
_owners: weakref.WeakSet[Any] = weakref.WeakSet()  # of what a forked child must not use


def disown_in_children(owner: Any) -> None:
    """Has `owner.disown()` called in each process that is forked from this one.

    The child has the open files and none of the threads; their locks may be held forever.
    """
    _watch_forks()
    _owners.add(owner)


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=_disown_all)


def _disown_all() -> None:
    for owner in list(_owners):
        owner.disown()
    _owners.clear()


class Operation:
    """A fixed list of statements that run in one transaction, all or none.

    Each kind of operation is a subclass that holds the whole logic of its call.  Until it is done
    an operation belongs to the committer thread, which calls its methods in this order:

    - `on_begin` before its statements, if it `is_bulk`;
    - `on_executed` after its statements and before the commit;
    - `on_commit` after the commit, in the order of commits, unless the operation failed;
    - `on_done` last, whether it failed or not.

    If a transaction fails, or must begin again, what has joined it is dropped, and the statements
    and first two methods of the others run again: what they note holds for the last try.
    """

    statements: Sequence[str] = ()
    parameters: Parameters = types.MappingProxyType({})  # of all statements; a list: of each one
    results: list[Any]  # of each statement, once it has run: rows, or (rows changed, last id)
    is_bulk = False  # whether it may touch many rows, or has a list of parameters
    durable = True  # whether no power failure may undo it; may be set until after `on_executed`
    done_callback: Optional[DoneCallback] = None  # called once with the finished operation
    error: Optional[Exception] = None
    adds = 0  # about how many bytes of messages it adds: refused while space is short
    seconds = 0.0  # how long the statements took, in bulk
    size = 0  # bytes that it reads or writes, if they may be many
    owner: Any = None  # for the done callback: whose operation it is
    is_large = False  # whether the reply is large: then a thread of its own renders it
    look_ups: Mapping[int, Any] = types.MappingProxyType({})  # of an `Observer`, by position
    looked_up: Sequence[tuple[Any, list[Any]]] = ()  # each of them with its rows

    def __init__(self, statements: Sequence[str] = (), parameters: Parameters = parameters) -> None:
        self.statements = statements
        self.parameters = parameters

    def on_begin(self) -> None:
        """May change `parameters`, which depend on the moment."""

    def separate_look_ups(self) -> None:
        """Takes the rows that an `Observer` wants out of the results; called before
        `on_executed` if there are any."""
        results, look_ups = self.results, self.look_ups
        self.looked_up = [(look_up, results[i]) for i, look_up in look_ups.items()]
        self.results = [result for i, result in enumerate(results) if i not in look_ups]

    def on_executed(self) -> None:
        """May join operations to the transaction."""

    def on_dropped(self) -> None:
        """Called if it joined a transaction that failed, and nothing else after it: undoes what
        was changed in memory for it to join."""

    def on_commit(self) -> None:
        """Changes what is kept in memory.  Must be short."""

    def on_done(self) -> None:
        """Passes the operation on to whoever asked for it."""
        if self.done_callback is not None:
            self.done_callback(self)

    def rows(self) -> list[Any]:
        """The results once it is done; raises its error if it failed."""
        if self.error is not None:
            raise self.error
        return self.results

    def result(self) -> Any:
        """What the results mean to the caller; raises if the call failed."""
        return self.rows()


DoneCallback = Callable[[Operation], None]


class Observer(Protocol):
    """What may watch the operations of a committer, in its thread."""

    def prepare(self, operation: Operation) -> None:
        """May add look-ups to an operation that is about to run."""

    def report(self, operation: Operation) -> None:
        """Gets an operation with look-ups after its commit, and before its `on_commit`."""


class TransactionFailed(Exception):
    """All operations of a transaction failed alike; `reason` is the error for the clients.

    Trying them one by one would be in vain, or might execute them twice.
    """

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


ANY_AGE = float("inf")  # of a record of broker time of which only the wall clock tells the age


class Transactions(Protocol):
    """What the committer and the broker need of a store."""

    path: str  # the name of the database
    is_shared: bool  # whether other servers change the same database
    first_lease: int  # no message gets a lower lease: it may have been given out

    def join(self, now: Callable[[], float]) -> tuple[str, float]:
        """The record of broker time, and how old it is at most, in seconds.

        `now()` is the broker time of each transaction after this.
        """

    def transact(self, batch: list[Operation]) -> list[Operation]:
        """Runs the statements and `on_executed` of each operation, in order, and commits.

        The batch may grow meanwhile.  Returns those that joined too late: they belong to the next
        transaction.  If this raises, nothing was changed; but see `TransactionFailed`.
        """

    def read(self, *statements: str, **parameters: object) -> list[list[Any]]:
        """The rows of selects, all from the moment of the last commit; for any thread."""

    def check_space(self) -> None:
        """`Full` when space is so short that only takes and deletes may go on."""

    def size(self) -> int:
        """The size of the database in bytes, -1 for one in memory."""

    def disk_usage(self) -> dict[str, int]:
        """The bytes of the database, of its log, and free on its disk, by name in METRICS."""

    def copy(self, path: str) -> None:
        """Copies the database, as of the last commit, into an empty file; commits go on."""

    def open_snapshot(self) -> BinaryIO:
        """A copy of the database in a file that is gone when it is closed."""

    def hurry(self) -> None:
        """The server stops: calls that the database does not answer fail soon."""

    def close(self) -> None:
        """Closes the database; calls after this fail."""


class Waker:
    """Lets one thread wait until another one wakes it, or for some seconds.

    Not a Condition: until Python 3.10, and on macOS, its timeout follows the wall clock, and a
    wait of a second becomes one of an hour when that clock is set back by an hour.  Nor a lock or
    a SimpleQueue: a thread that is woken by one would have to wait for the interpreter, which
    `wake` gives up while it writes.
    """

    def __init__(self) -> None:
        self._pipe: Optional[Pipe] = Pipe()

    def wait(self, seconds: Optional[float] = None) -> None:
        """Waits; returns at once if `wake` was called since the last time."""
        pipe = self._pipe
        if pipe is not None and (seconds is None or pipe.poller.poll(seconds * 1000)):
            os.read(pipe.receiver, 4_096)

    def wake(self) -> None:
        """Ends the wait of the other thread."""
        pipe = self._pipe
        if pipe is not None:
            try:
                os.write(pipe.sender, b"!")
            except BlockingIOError:
                return  # it has been woken thousands of times

    def close(self) -> None:
        """Gives back the file descriptors, when no thread uses them any more."""
        self._pipe = None


class Pipe:
    """The file descriptors of a `Waker`, open as long as anything refers to them: the number of
    one that is closed while a thread is about to write soon belongs to another file."""

    def __init__(self) -> None:
        self.receiver, self.sender = os.pipe()
        os.set_blocking(self.sender, False)
        self.poller = select.poll()
        self.poller.register(self.receiver, select.POLLIN)

    def __del__(self) -> None:
        os.close(self.receiver)
        os.close(self.sender)


class Committer:
    """Group commit: one thread that runs the operations of all others.

    No thread that waits here holds a lock, and none is shared with the committer thread: pending
    operations travel through `deque.append` and results through `SimpleQueue.put`, each of which
    happens whole or not at all.  (A Condition would not do: its lock is taken in Python code, and
    an exception raised there by a signal handler leaves it locked forever.)  The committer thread
    says that it sleeps before it looks for the last time whether something is pending.
    """

    def __init__(
        self, store: Transactions, companion: Callable[[], Optional[Operation]] = lambda: None
    ) -> None:
        """`companion()` is called before each transaction, and may give an operation that goes
        with it; it must not raise."""
        self.observer: Optional[Observer] = None
        self.first_lease = store.first_lease
        self._store = store
        self._companion = companion
        self._pending: collections.deque[Operation] = collections.deque()
        self._waker = Waker()
        self._sleeps = False
        self._main_thread = threading.main_thread().ident
        self._batch: Optional[list[Operation]] = None  # off the list, and not yet committed
        self.runs_alone = False  # whether an error in `on_executed` undoes only its operation
        self.commit_times = Histogram(SHORT_SECONDS)
        self.commit_sizes = Histogram(AMOUNTS)
        self._closing = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="linger-committer", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation) -> None:
        """Puts an operation on the list and returns; its `on_done` tells when it is done."""
        self._pending.append(operation)
        if self._sleeps:
            # Whoever submits meanwhile need not wake it.  But in the main thread a signal handler
            # may run before `wake`: it may raise, or make a call.
            if threading.get_ident() != self._main_thread:
                self._sleeps = False
            self._waker.wake()
        if self._closed:
            self._refuse_pending()

    def run(self, operation: Operation) -> Any:
        """Runs an operation and returns its result; by then it is committed.

        An exception in this thread (Ctrl-C, SIGALRM) ends only the waiting.
        """
        self.check_thread()
        done: queue.SimpleQueue[Operation] = queue.SimpleQueue()
        operation.done_callback = done.put
        self.submit(operation)
        return done.get().result()

    def check_thread(self) -> None:
        """RuntimeError in the committer thread, which would wait for itself."""
        if threading.get_ident() == self._thread.ident:
            raise RuntimeError("a callback must not make a call that waits for a commit")

    def join_transaction(self, operation: Operation) -> None:
        """Adds an operation to the transaction under way, or the next; only for `on_executed`,
        which does it anew in each try."""
        assert self._batch is not None, "no transaction is under way"
        if self.observer is not None:
            _prepare([operation], self.observer)
        self._batch.append(operation)

    def read(self, *statements: str, **parameters: object) -> list[list[Any]]:
        """The rows of selects, from one moment; they include what was submitted before.

        A client may ask for that before it has its response.
        """
        self.check_thread()
        if self._pending or self._batch is not None:
            self.run(Operation())
        return self._store.read(*statements, **parameters)

    def close(self) -> None:
        """Finishes what is pending and ends the thread; operations after this fail."""
        self.check_thread()
        self._closing = True
        self._waker.wake()
        self._thread.join()
        self._waker.close()

    def _work(self) -> None:
        pending = self._pending
        while not self._closing or pending:
            if not pending:
                self._sleep()
                continue
            batch: list[Operation] = []
            self._batch = batch  # before the list is empty: `read` looks at that first
            batch.extend(itertools.islice(iter(pending.popleft, None), len(pending)))
            if sum(map(SIZE_OF, batch)) > MAX_TRANSACTION_BYTES:
                pending.extendleft(reversed(_take_large(batch)))
            companion = self._companion()
            if companion is not None:
                batch.append(companion)
            if self.observer is not None:
                _prepare(batch, self.observer)
            self._commit(batch)
            self._batch = None
            _run_done_callbacks(batch)
        self._closed = True
        self._refuse_pending()

    def _sleep(self) -> None:
        """Sleeps until an operation is submitted, or this closes."""
        self._sleeps = True
        if not self._pending and not self._closing:
            self._waker.wait()
        self._sleeps = False

    def _refuse_pending(self) -> None:
        """Fails what was submitted too late."""
        with contextlib.suppress(IndexError):
            while True:
                operation = self._pending.popleft()
                operation.error = Unavailable("the database is closed")
                _run_done_callbacks([operation])

    def _commit(self, batch: list[Operation], alone: bool = False) -> None:
        """Runs operations in one transaction; if it fails, each in one of its own, so that one
        that is refused harms no other.  If no transaction can begin, all fail at once."""
        count, began = len(batch), time.perf_counter()
        try:
            late = self._store.transact(batch)
        except TransactionFailed as error:
            _fail(batch, error.reason)
        except Exception as error:
            if alone:
                _fail(batch, error)
            else:
                drop_joined(batch, count)
                self._repeat(batch)
        else:
            self.commit_times.observe(time.perf_counter() - began)
            self.commit_sizes.observe(len(batch))
            for operation in late:
                self.submit(operation)
            _run_commit_callbacks(batch, self.observer)

    def _repeat(self, batch: list[Operation]) -> None:
        """Runs each operation in a transaction of its own, and so, right after it, what joins."""
        self.runs_alone = not self._store.is_shared  # there it is committed by then
        for place, operation in enumerate(batch, 1):
            operation.durable = True  # else it may have to begin again, and others join twice
            joined: list[Operation] = []
            self._batch = joined
            self._commit([operation], alone=True)
            if operation.error is not None:
                drop_joined(joined)
            batch[place:place] = joined
        self.runs_alone = False


SIZE_OF = operator.attrgetter("size")


def _take_large(batch: list[Operation]) -> list[Operation]:
    """Takes the large operations beyond MAX_TRANSACTION_BYTES out of a batch, and returns them.

    They are left for later transactions, so that small ones need not wait for all of them.  No two
    are of one connection, so it does not matter which is first.
    """
    kept, taken = [], []
    size = 0
    for operation in batch:
        if operation.size > SMALL_AMOUNT:
            if size and size + operation.size > MAX_TRANSACTION_BYTES:
                taken.append(operation)
                continue
            size += operation.size
        kept.append(operation)
    batch[:] = kept
    return taken


def _fail(batch: Iterable[Operation], error: Exception) -> None:
    for operation in batch:
        operation.error = error


def drop_joined(batch: list[Operation], count: int = 0) -> None:
    """Takes what joined a failed transaction, all but the first `count`, off its batch."""
    for operation in batch[count:]:
        operation.on_dropped()
    del batch[count:]


def _prepare(batch: Iterable[Operation], observer: Observer) -> None:
    """Lets an observer prepare operations; a bug in it must not end this thread."""
    for operation in batch:
        try:
            observer.prepare(operation)
        except Exception:
            log(traceback.format_exc())


def _run_commit_callbacks(batch: Iterable[Operation], observer: Optional[Observer]) -> None:
    """A bug in one must not stop the others."""
    for operation in batch:
        try:
            if operation.error is not None:
                continue
            try:
                if observer is not None and operation.looked_up:
                    observer.report(operation)
            finally:
                operation.on_commit()
        except Exception:
            log(traceback.format_exc())


def _run_done_callbacks(batch: Iterable[Operation]) -> None:
    """Some are foreign code: whatever they raise, `sys.exit` too, must not end this thread."""
    for operation in batch:
        try:
            operation.on_done()
        except BaseException:
            log(traceback.format_exc())


# ---------------------------------------------------------------------------------------------
# Files: the lock of a database, and whether its log belongs to it.
#
# SQLite replays whatever log lies beside a file, also one of another file or of another time.  So
# each log records for which content of the file it was begun.  Knows the formats of both files
# (sqlite.org/fileformat2.html and walformat.html) but no SQL.
# ---------------------------------------------------------------------------------------------

LOCK_BYTE = 0x40000400  # in a page that SQLite never reads or writes (fileformat2.html 1.4)
PAGE_SIZES = {1 << power for power in range(9, 17)}  # bytes
SECTOR = 512  # bytes that a disk writes whole or not at all
LOG_HEADER = 32  # bytes
FRAME_HEADER = 24  # bytes before each page in the log
FRAMES_AT_ONCE = 64  # frames of the log that are read at once
MARK_TRIES = 3  # tries to record for which file a log was begun
LOOKS = 3  # at a file that may be written at this moment, before it counts as changed
ROLLBACK_MODE = b"\1\1"  # bytes 18 and 19 of a file that has no log, such as a backup

Sectors = set[tuple[int, int, int]]  # (page number, sector within the page, its CRC)

open_inodes: set[tuple[int, int]] = set()  # of all databases that this process has open


def inode_of(path: str) -> tuple[int, int]:
    """What tells a file from another that has taken its name."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def lock_database(path: str, check: Callable[[str], object]) -> int:
    """Locks `<path>-lock` for as long as the descriptor returned is open.

    Nothing of the database is touched before.  The lock ends with the process; the file stays.  So
    `check(path)` may refuse another program's file before a lock is made beside it.
    """
    if is_special(path):
        raise Unavailable(f"cannot open the database {path}: it is a directory or a device")
    with contextlib.suppress(OSError):
        if inode_of(path) in open_inodes:  # closing a descriptor of it would drop SQLite's locks
            raise in_use(path)
    try:
        if not os.path.lexists(path + "-lock"):
            check(path)
        descriptor = os.open(path + "-lock", os.O_RDWR | os.O_CREAT, 0o600)
    except (sqlite3.Error, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unavailable(f"cannot open the database {path}: {reason}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise in_use(path) from error
    return descriptor


def is_special(path: str) -> bool:
    """Whether there is something that is no file, such as /dev/null, which root could replace."""
    return os.path.exists(path) and not os.path.isfile(path)


def in_use(path: str) -> Unavailable:
    """The error of a start on a database that another server has."""
    return Unavailable(f"the database {path} is in use by another Linger")


def remove_files(path: str, *suffixes: str) -> None:
    """Removes those of the files that exist."""
    for suffix in suffixes:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + suffix)


def set_aside_log(path: str) -> None:
    """Renames a log that does not belong to its database: SQLite would replay it."""
    log_path = path + "-wal"
    with contextlib.suppress(FileNotFoundError):
        if not os.stat(log_path).st_size:
            return
        stale = log_path + ".stale"
        for number in itertools.count(2):
            if not os.path.lexists(stale):
                break
            stale = f"{log_path}.stale.{number}"
        os.rename(log_path, stale)
        remove_files(path, "-shm")
        name = os.path.basename(path)
        log(
            f"linger: {name}-wal is not the log of {name}, which was deleted, restored or"
            f" replaced: renamed it to {os.path.basename(stale)}"
        )


class LogFile:
    """The log of a database, open for reading.

    A log begins anew, with other salts, when all of it has been written back into the database.
    """

    marked = b""  # the salts of the last one that says to which file it belongs

    def __init__(self, path: str) -> None:
        self._file = os.open(path + "-wal", os.O_RDONLY)
        self.begin()

    def begin(self) -> None:
        """Reads the header; `frames` begins with the first one again."""
        header = os.pread(self._file, LOG_HEADER, 0)
        self.salts = header[16:24]
        self.page: int = struct.unpack(">I", header[8:12])[0] if len(header) == LOG_HEADER else 0
        if self.page not in PAGE_SIZES:
            self.page = 0  # no log, or none that SQLite would read
        self._offset = LOG_HEADER

    def has_begun_anew(self) -> bool:
        """Whether the log is not the one whose header was read."""
        return os.pread(self._file, len(self.salts) or 8, 16) != self.salts

    def is_marked(self) -> bool:
        """Whether the log is still the one that was `marked` last; not if it cannot be read."""
        try:
            return os.pread(self._file, 8, 16) == self.marked
        except OSError:
            return False

    def frames(self) -> Iterator[tuple[int, int]]:
        """The number and the offset of each page that has been written since the last call."""
        frame = struct.Struct(f">I4x8s8x{self.page}x")  # the page's number, the log's salts
        is_end = not self.page
        while not is_end:
            content = os.pread(self._file, FRAMES_AT_ONCE * frame.size, self._offset)
            whole = content[: len(content) // frame.size * frame.size]
            found = list(frame.iter_unpack(whole))
            while found and found[-1][1] != self.salts:
                found.pop()  # of an earlier log, which was longer
            offsets = itertools.count(self._offset + FRAME_HEADER, frame.size)
            yield from zip(map(operator.itemgetter(0), found), offsets)  # without a loop in Python
            self._offset += len(found) * frame.size
            is_end = len(found) < FRAMES_AT_ONCE

    def read(self, offset: int) -> bytes:
        """A page."""
        return os.pread(self._file, self.page, offset)

    def sectors(self, *pages: int) -> Sectors:
        """Those of these pages, from the frames that have been written since the last call."""
        found: Sectors = set()
        for number, offset in self.frames():
            if number in pages:
                found |= sectors_of(number, self.read(offset), self.page)
        return found

    def close(self) -> None:
        """Closes it; SQLite holds no lock on a log."""
        os.close(self._file)


def sectors_of(number: int, content: bytes, page: int) -> Sectors:
    """The sectors of a page, which has `page` bytes."""
    return {
        (number, index, binascii.crc32(content[index * SECTOR : (index + 1) * SECTOR]))
        for index in range(page // SECTOR)
    }


class DatabaseFile:
    """The file of a database, open for as long as SQLite has it open.

    It is opened before and closed after SQLite's connections: closing any descriptor of a
    database drops the locks that SQLite has on it (sqlite.org/howtocorrupt.html 2.2).

    - It is locked itself, so that a second server finds out also when the lock file was removed,
      and through another link.  This lock belongs to the open file, and SQLite's are not touched.
    - Two of its pages are watched: the first one, which a copy made by SQLite does not keep, and
      that of the table `config`, which each log changes.  SQLite writes to them only what is in
      the log.  Sector by sector, because a power failure may leave half of a page.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._directory = os.path.dirname(path)
        self._inode = inode_of(path)
        self._file = os.open(path, os.O_RDWR)
        self._log: Optional[LogFile] = None
        self._root = 0  # the page of `config`
        self._known: Sectors = set()  # what may stand in the watched pages
        try:
            self._lock()
        except BaseException:
            os.close(self._file)
            raise
        open_inodes.add(self._inode)

    def _lock(self) -> None:
        """Locks a byte of the file, where the system has locks that belong to an open file."""
        if not hasattr(fcntl, "F_OFD_SETLK"):
            return
        lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, LOCK_BYTE, 1, 0)
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, lock)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise in_use(self._path) from error

    def check_log(self) -> None:
        """Before SQLite opens the file: sets the log aside if it is certainly not its own."""
        try:
            log_file = LogFile(self._path)
        except FileNotFoundError:
            return
        try:
            is_stale = bool(log_file.page) and not self._may_be_own(log_file)
        finally:
            log_file.close()
        if is_stale:
            set_aside_log(self._path)

    def _may_be_own(self, log_file: LogFile) -> bool:
        """Whether the watched pages hold what they held when the log was begun, or what is in it.

        A log without a mark holds no more than one commit of Linger, not yet acknowledged.
        """
        if os.pread(self._file, 2, 18) == ROLLBACK_MODE:
            return False
        count = log_file.page // SECTOR
        form = b"%s:([0-9]+):([0-9a-f]{%d})" % (log_file.salts.hex().encode(), count * 16)
        mark = re.compile(form)
        marks = {
            match.groups()
            for _, offset in log_file.frames()
            for match in mark.finditer(log_file.read(offset))
        }
        for root in {int(root) for root, _ in marks}:
            log_file.begin()
            known = log_file.sectors(1, root)
            for _, text in (match for match in marks if int(match[0]) == root):
                crcs = struct.unpack(f">{count * 2}I", bytes.fromhex(text.decode()))
                known |= {(1, index, crc) for index, crc in enumerate(crcs[:count])}
                known |= {(root, index, crc) for index, crc in enumerate(crcs[count:])}
            if not self._watched(root) <= known:
                return False
        return True

    def _watched(self, root: int) -> Sectors:
        """The sectors of the watched pages, as they stand in the file."""
        page: int = struct.unpack(">H", os.pread(self._file, 2, 16).rjust(2, b"\0"))[0]
        page = 65_536 if page == 1 else page
        return sectors_of(1, os.pread(self._file, page, 0), page) | sectors_of(
            root, os.pread(self._file, page, (root - 1) * page), page
        )

    def watch(self, root: int) -> LogFile:
        """After SQLite has opened the file: begins to watch it; `root` is the page of `config`.

        Returns its log.
        """
        self._root = root
        self._log = LogFile(self._path)
        self._known = self._watched(root) | self._log.sectors(1, root)
        return self._log

    def stamp(self) -> tuple[int, int, int]:
        """Time and size of the file, and when one of its directory was made, moved or deleted."""
        status = os.fstat(self._file)
        try:
            directory_changed = os.stat(self._directory).st_mtime_ns
        except OSError:
            directory_changed = 0
        return status.st_mtime_ns, status.st_size, directory_changed

    def is_own(self) -> bool:
        """Whether the file has the content that SQLite gave it."""
        for look in range(LOOKS):
            if look:
                time.sleep(0.01)
            if self._looks_own():
                return True
        return False

    def _looks_own(self) -> bool:
        """Whether the watched pages hold what SQLite wrote to them.

        If another program has let the log begin anew, that is not known, and assumed.
        """
        assert self._log is not None
        watched = self._watched(self._root)  # before the log, to which it was written first
        if not watched or os.pread(self._file, 2, 18) == ROLLBACK_MODE:
            return False  # it is empty or zeroed, or a backup
        if watched <= self._known:  # as usual: without a look at each frame of the log
            return True
        if self._log.has_begun_anew():
            self._log.begin()
            self._known = watched
        self._known |= self._log.sectors(1, self._root)
        if not watched <= self._known:  # frames of a rolled-back transaction are written again
            self._log.begin()
            self._known |= self._log.sectors(1, self._root)
        return watched <= self._known

    def next_mark(self) -> str:
        """After a commit: what to record in the log if it has begun anew, else an empty text.

        That is its salts, the page of `config`, and the sectors of both watched pages as they are
        now: the file is what the log was begun for, or has some of its pages already.
        """
        assert self._log is not None
        if self._log.is_marked() or not self.is_own():  # what the log before had is still known
            return ""
        self._log.begin()
        if not self._log.page:
            return ""
        watched = self._watched(self._root)
        self._known = watched | self._log.sectors(1, self._root)
        crcs = "".join(f"{crc:08x}" for _, _, crc in sorted(watched))
        return f"{self._log.salts.hex()}:{self._root}:{crcs}"

    def note_marked(self) -> None:
        """After the mark has been recorded in the log.

        With its frames most checks after a checkpoint need not read the others.
        """
        assert self._log is not None
        self._log.marked = self._log.salts
        self._known |= self._log.sectors(1, self._root)

    def close(self, forget: bool = True) -> None:
        """After SQLite has closed the file; `forget=False` if it has not, and never will."""
        os.close(self._file)
        if self._log is not None:
            self._log.close()
        if forget:
            open_inodes.discard(self._inode)


def abandon(connection: sqlite3.Connection) -> None:
    """Never closes a connection: SQLite would write the log into a file that is not its own."""
    import ctypes  # takes memory and time, and is nearly never needed

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


# ---------------------------------------------------------------------------------------------
# Store: SQLite and its files.  Runs what the committer gives it; knows no consumers and no clock.
# ---------------------------------------------------------------------------------------------

MEMORY = ":memory:"
SYNC_LEVELS = ("full", "normal", "off")
SYNC_FULL = "pragma synchronous = full"
SYNC_NORMAL = "pragma synchronous = normal"
OLDEST_SQLITE = (3, 31)
IS_DURABLE = operator.attrgetter("durable")
BYTES_ADDED = operator.attrgetter("adds")
SQLITE_IOERR = 10  # primary result codes, sqlite.org/rescode.html
SQLITE_CORRUPT = 11
SQLITE_FULL = 13
SQLITE_NOTADB = 26
ERROR_MESSAGES = {
    SQLITE_IOERR: "disk I/O error",
    SQLITE_CORRUPT: "database disk image is malformed",
    SQLITE_FULL: "database or disk is full",
    SQLITE_NOTADB: "file is not a database",
}
OTHER_DATABASE = "choose another --dbfile"
BACKUP_HINT = "stop the server and restore a backup as README, Backup, says"


class Reserve:
    """A file that holds room on the disk until takes and deletes need it.

    Looking at the free space would not do: other programs use it up, and posts between two looks.
    Usable from any thread.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._fill_at = 0.0  # not to try again at once what has failed
        self.size = size  # what it should hold, bytes; less where the system allows no such file
        self.held = 0  # what it holds
        with contextlib.suppress(OSError):
            status = os.stat(path)
            self.held = min(size, status.st_size, status.st_blocks * 512)

    @property
    def missing(self) -> int:
        return self.size - self.held

    @locked
    def fill(self) -> None:
        """Makes it whole, or leaves it as it was."""
        if time.monotonic() < self._fill_at:
            return
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                allocate(file, self.held, self.size)
            finally:
                os.close(file)
            self.held = self.size
        except OSError as error:
            self._fill_at = time.monotonic() + RESERVE_RETRY_DELAY
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self.size = self.held
            self._shrink()

    @locked
    def give_up(self, size: int) -> None:
        """Gives bytes back to the disk."""
        self.held = max(0, self.held - size)
        self._shrink()

    def _shrink(self) -> None:
        with contextlib.suppress(OSError):
            if self.held:
                os.truncate(self._path, self.held)
            else:
                os.unlink(self._path)


class SpaceGuard:
    """Keeps enough of the disk, and of `max_size`, free: takes and deletes always work.

    - The file grows before a commit, not when SQLite writes the log back into it: so that can
      always be done, and then the log is used again from its start.
    - On a small disk this happens early, and the log is cut to a bounded size.
    - A reserve is given up when a take or delete needs more room, and made again when there is.
    - What adds is refused from when nearly nothing is free, on the disk and inside the file, until
      there is room for a whole reserve more.

    `check` may be called by any thread, the other methods by the one that writes.
    """

    def __init__(self, path: str, max_size: int, measure: Callable[[], tuple[int, int]]) -> None:
        """`max_size`: bytes that the database may have, 0 for any number; `measure()` gives the
        bytes of the database, and how many of them are free for new rows."""
        self._path = path
        self._max_size = max_size
        self._measure = measure
        self._lock = threading.RLock()  # one thread looks at a time
        self._file = self._shm = -1  # descriptors; without a file there is no disk to look at
        self._look_at = 0.0
        self._ahead = 0  # bytes that may be added until the size of the file is compared again
        self._spare = 0  # bytes of the disk that posts may use
        self.is_short = False  # whether that is little: each commit looks
        self._is_full = False  # whether what adds is refused
        self.failures = 0  # how often SQLite found no room

    def prepare(self) -> None:
        """Before SQLite opens the database, which takes some room."""
        free, self._unit = free_space(os.path.dirname(self._path))
        self._step = self._unit // RESERVE_STEPS
        self._log_limit = min(self._unit, LOG_SIZE_LIMIT)
        growth = self._unit // 8 // MIN_GROWTH * MIN_GROWTH  # in whole pages
        self._growth = min(MAX_GROWTH, max(MIN_GROWTH, growth))
        self._reserve = Reserve(self._path + "-reserve", self._unit)
        if free < self._step:
            self._reserve.give_up(self._step)
        self._file = os.open(self._path, os.O_RDWR)

    def start(self, writer: sqlite3.Connection) -> None:
        """After SQLite has opened the database.

        Allocates the `-shm` file: SQLite leaves holes in it, and on a full disk the system would
        kill a process that writes to them.  Its descriptor must stay open, as that of the
        database: closing one would drop SQLite's locks on the file.
        """
        self._page: int = writer.execute("pragma page_size").fetchone()[0]
        pages = min(LOG_PAGES, self._unit // 2 // self._page)
        writer.execute(f"pragma wal_autocheckpoint = {max(1, pages)}").fetchall()
        writer.execute(f"pragma journal_size_limit = {self._log_limit}").fetchall()
        if hasattr(os, "posix_fallocate"):
            disk = os.statvfs(self._path)
            longest = disk.f_blocks * disk.f_frsize // self._page  # log that the disk holds, pages
            with contextlib.suppress(OSError):
                self._shm = os.open(self._path + "-shm", os.O_RDWR)
                size = (longest // SHM_PAGES + 1) * SHM_REGION
                os.posix_fallocate(self._shm, 0, min(MAX_SHM, size))
        self._look(refused=True)  # a disk that was full at the stop still is

    def close(self) -> None:
        """After SQLite has closed the database."""
        files = (self._file, self._shm)
        self._file = self._shm = -1
        for file in files:
            if file >= 0:
                os.close(file)

    def check(self) -> None:
        """`Full` when so little of the disk, or of `max_size`, is free that only takes and
        deletes may go on.

        A disk that had enough is looked at again a moment later.
        """
        if self._max_size:
            self._check_size()
        if self._file < 0 or (not self._is_full and time.monotonic() < self._look_at):
            return
        self._look()
        if self._is_full:
            raise Full("the disk is full: messages can be taken and deleted, but none added")

    def _check_size(self) -> None:
        limit = self._max_size - reserve_of(self._max_size)
        with contextlib.suppress(OSError):  # in memory there is no file
            if os.stat(self._path).st_size + os.stat(self._path + "-wal").st_size <= limit:
                return
        size, free = self._measure()
        if size - free > limit:
            raise Full(
                f"the database is near its limit of {self._max_size} bytes: messages can be taken"
                " and deleted, but none added"
            )

    @locked
    def _look(self, refused: bool = False) -> None:
        """Sees how much room there is, makes the reserve whole, and says when the disk is full.

        `refused`: whether a transaction found too little room, so that it is full unless there
        is room for a whole reserve, or the queue is nearly empty.
        """
        try:
            free, _ = free_space(self._path)
            log_room = max(0, self._log_limit - os.stat(self._path + "-wal").st_size)
            missing = self._reserve.missing
            if missing and free >= missing + log_room + self._growth:
                self._reserve.fill()
                free, _ = free_space(self._path)
        except OSError:
            return  # a deleted file: the transaction reports it
        self._spare = spare = free - log_room - self._reserve.missing
        self.is_short = spare < self._unit
        self._look_at = time.monotonic() + SPACE_CHECK_INTERVAL
        size, inside = self._measure() if self.is_short else (0, 0)
        room = inside + max(0, spare)
        if room >= self._unit or inside * 4 > size * 3:
            self._set_full(False)
        elif refused or room < self._unit // 8:
            self._set_full(True)

    def _set_full(self, is_full: bool) -> None:
        if is_full and not self._is_full:
            log("linger: the disk is full: messages can be taken and deleted, but none added")
        elif self._is_full and not is_full:
            log("linger: there is room on the disk again: messages can be added")
        self._is_full = is_full

    def before_commit(self, writer: sqlite3.Connection, adds: int) -> None:
        """Lets the file grow for the transaction under way; `Full` if it adds too much.

        While there is plenty of room this is done now and then, so that the file lags behind by
        less than the reserve.
        """
        if adds and self._max_size:
            self._check_used(writer)
        self._ahead -= adds
        if self._file < 0 or not (self.is_short or (adds and self._ahead < 0)):
            return
        pages = writer.execute("pragma page_count").fetchone()[0]
        self._extend(writer, pages * self._page, adds)
        if self.is_short:
            self._look()
            inside = self._free_inside(writer, self._page)
            if adds and (self._is_full or inside + max(0, self._spare) < self._unit // 8):
                self._refuse()

    def _check_used(self, writer: sqlite3.Connection) -> None:
        """Many posts at once must not fill the part of `max_size` that is kept for takes."""
        limit = self._max_size - reserve_of(self._max_size) // 2
        page = writer.execute("pragma page_size").fetchone()[0]
        size = writer.execute("pragma page_count").fetchone()[0] * page
        if size > limit and size - self._free_inside(writer, page) > limit:
            raise Full(f"the database is near its limit of {self._max_size} bytes")

    def _free_inside(self, writer: sqlite3.Connection, page: int) -> int:
        pages: int = writer.execute("pragma freelist_count").fetchone()[0]
        return pages * page

    def _extend(self, writer: sqlite3.Connection, size: int, adds: int) -> None:
        """Lets the file grow to `size`; what adds leaves MIN_GROWTH for takes and deletes."""
        now = os.fstat(self._file).st_size
        left = now - size
        if left >= 0:
            self._ahead = left + self._free_inside(writer, self._page) - MIN_GROWTH
            if self._ahead >= 0 or not adds:
                return
        if adds:
            self._look()
            size += self._growth
            if self._spare < size - now:
                self._refuse()
        try:
            allocate(self._file, now, size)
        except OSError:
            if adds:
                self._refuse()
            self._reserve.give_up(self._step)
            try:
                allocate(self._file, now, size)
            except OSError as error:
                reason = f"the database cannot grow{NOTHING_CHANGED}: {error.strerror}"
                raise Full(reason) from error
        if adds:
            self._ahead = self._growth - MIN_GROWTH

    def _refuse(self) -> NoReturn:
        """Refuses one transaction, and all that add from now on if there is little room."""
        self._look(refused=True)
        raise Full(f"there is no room for this on the disk{NOTHING_CHANGED}")

    def make_room(self, writer: sqlite3.Connection) -> None:
        """After SQLite found no room, and with no transaction under way.

        Lets it use the log from its start, and cuts the log, which the next commit does.
        """
        self.failures += 1
        if self._file < 0:
            return
        for _ in range(2):
            try:
                writer.execute("pragma wal_checkpoint(restart)").fetchall()
                writer.execute(f"pragma user_version = {SCHEMA_VERSION}").fetchall()
                break
            except sqlite3.Error:
                self._reserve.give_up(self._step)
        free, _ = free_space(self._path)
        if free < self._step:
            self._reserve.give_up(self._step)
        self._look(refused=True)


def reserve_of(total: int) -> int:
    """The bytes of `total` that are kept for takes and deletes."""
    return min(DISK_RESERVE, total // DISK_RESERVE_SHARE)


def free_space(path: str) -> tuple[int, int]:
    """The bytes free on a file's disk, and how many of all its bytes are kept for takes and
    deletes."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize, reserve_of(disk.f_blocks * disk.f_frsize)


def allocate(file: int, start: int, end: int) -> None:
    """Makes a file longer, with room on the disk for all of it; `OSError` if there is none."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, start, end - start)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    while start < end:
        start += os.pwrite(file, bytes(min(FILE_CHUNK, end - start)), start)


def refuse_mount_point(path: str) -> None:
    """`Unavailable` if the file is itself a mount point, as one that is bound into a container: its
    log would be beside it, in the container's own layer, and be lost with the container."""
    mounts = b""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as file:  # proc(5)
        mounts = file.read()
    for line in mounts.splitlines():
        escaped = line.split(b" ")[4]
        point = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), escaped)
        if point == os.fsencode(path) and not os.path.isdir(path):
            raise Unavailable(
                f"the file {path} is a mount point itself, so its log would be on another disk and"
                f" could be lost: mount its folder {os.path.dirname(path)} instead"
            )


@functools.cache
def by_position(statement: str) -> tuple[str, Callable[[Any], Sequence[Any]], bool]:
    """A statement whose parameters have numbers in place of names, what puts those of a mapping in
    that order, and whether it changes rows.

    For each name the sqlite3 module makes a text, and releases the interpreter, which then has to
    be got back from other threads.
    """
    numbers: dict[str, int] = {}
    sql = re.sub(
        r":(\w+)", lambda found: f"?{numbers.setdefault(found[1], len(numbers) + 1)}", statement
    )
    changes = sql.lstrip().lower().startswith(("insert", "replace", "update", "delete"))
    if len(numbers) > 1:
        return sql, operator.itemgetter(*numbers), changes
    if numbers:
        (name,) = numbers
        return sql, lambda parameters: (parameters[name],), changes
    return sql, lambda parameters: (), changes


class Store:
    """The database: one connection that writes and one that reads; in memory they are the same.

    The writing connection belongs to the thread that calls `transact`.
    """

    is_shared = False
    first_lease = 0
    _skips_sync = False  # whether commits that are not durable need no sync
    _is_synced = True  # whether the next commit is
    _damage = ""  # why nothing can be written any more, until a restart
    _noting = threading.Lock()  # guards `_damage` of all stores, so that it is logged once
    _is_disowned = False  # whether this is a forked child's copy
    _lock_file: Optional[int] = None  # open while the database is locked

    def __init__(self, path: str = MEMORY, sync: str = "full", max_size: int = 0) -> None:
        """Opens, creates or migrates the database at `path`; `LingerError` says why it cannot.

        `sync` is what a commit promises: `full` is on disk, `normal` may lose the last
        commits at a power failure, `off` leaves all to the system; none loses anything when only
        the process dies.  `max_size`: bytes that the database may have, 0 for any number.
        """
        require_posix("a server of Linger")
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise Unavailable(
                f"SQLite {sqlite3.sqlite_version} is too old: Linger needs SQLite 3.31 or later"
            )
        self.path = path if path == MEMORY else os.path.realpath(path)
        self.sync = check_choice("sync", sync, SYNC_LEVELS)
        self._lock = threading.RLock()  # guards the reading connection,
        self._write_lock = self._lock if path == MEMORY else threading.RLock()  # and the other one
        self._copying = threading.Lock()  # one copy is made at a time
        self._files: dict[str, tuple[int, int]] = {}  # the inodes of the open files
        self._checked = (0, 0, 0)  # the stamp of the file when all of them were last checked
        self._file: Optional[DatabaseFile] = None
        self._log: Optional[LogFile] = None
        self._closed = False
        self._space = SpaceGuard(self.path, max_size, self._measure)
        refuse_mount_point(self.path)
        with contextlib.ExitStack() as undo:
            if path != MEMORY:
                self._lock_file = lock_database(self.path, read_schema_version)
                undo.callback(os.close, self._lock_file)
            undo.callback(self._space.close)
            undo.callback(self._close_file)
            try:
                self._open()
                self._limit_size(max_size)
                self._raise_leases()
            except (sqlite3.Error, OSError) as error:
                hint = f" ({BACKUP_HINT})" if is_malformed(error) else ""
                raise Unavailable(f"cannot open the database {path}: {error}{hint}") from error
            undo.pop_all()
        disown_in_children(self)

    def _open(self) -> None:
        """Brings the file to our schema, then opens both connections."""
        if self.path == MEMORY:
            self._writer = self._reader = self._connect()
            self._cursor = self._writer.cursor()
            create_schema(self._writer)
            return
        open_or_migrate(self.path)
        self._file = DatabaseFile(self.path)
        self._file.check_log()
        remove_files(self.path, ".copy", ".copy-journal")  # of a server that was killed
        self._space.prepare()
        self._writer = self._connect()
        self._cursor = self._writer.cursor()
        self._reader = self._connect()
        self._reader.execute("pragma query_only = on")
        for path in (self.path, self.path + "-wal"):
            self._files[path] = inode_of(path)
        self._space.start(self._writer)
        root = "select rootpage from sqlite_master where name = 'config'"
        self._log = self._file.watch(self._reader.execute(root).fetchone()[0])

    def _limit_size(self, max_size: int) -> None:
        """Lets SQLite enforce the limit; a database that is larger still gets room for takes."""
        if max_size:
            size, _ = self._measure()
            limit = max(max_size, size + reserve_of(max_size))
            page = self._writer.execute("pragma page_size").fetchone()[0]
            self._writer.execute(f"pragma max_page_count = {limit // page}")

    def _raise_leases(self) -> None:
        """After a stop that was not in order: begins with leases above all that can have been
        given out by takes that a power failure has undone.

        Only if that is recorded may takes of this run be undone.
        """
        if self.path == MEMORY:
            return
        rows = self._reader.execute(GET_CONFIG, {"key": "leases"}).fetchall()
        first, state = rows[0][0].split() if rows else (0, "shut")
        self.first_lease = int(first) + (0 if state == "shut" else LEASES_PER_RUN)
        with contextlib.suppress(LingerError, TransactionFailed):  # the disk is full
            self.transact([Operation((SET_CONFIG,), self._leases("open"))])
            self._skips_sync = self.sync == "full"

    def _leases(self, state: str) -> dict[str, object]:
        return {"key": "leases", "value": f"{self.first_lease} {state}"}

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path,
            timeout=BUSY_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=STATEMENT_CACHE,
        )
        connection.execute(f"pragma synchronous = {self.sync}")
        connection.execute("pragma fullfsync = on")  # macOS: through the drive's own cache as well
        connection.execute("pragma temp_store = memory")
        connection.execute("pragma secure_delete = off")  # some builds overwrite deleted rows
        connection.execute("pragma journal_mode = wal").fetchall()
        connection.execute("select count(*) from sqlite_master").fetchall()  # makes -wal and -shm
        return connection

    # -- writing

    def join(self, now: Callable[[], float]) -> tuple[str, float]:
        """The record of broker time; it may be of any age."""
        (record,) = self.read(GET_CONFIG, key="time")
        return record[0][0] if record else "", ANY_AGE

    def transact(self, batch: list[Operation]) -> list[Operation]:
        """Runs operations in one transaction and commits; see `Transactions`."""
        with self._write_lock:
            try:
                if self._damage or (self._file is not None and self._file.stamp() != self._checked):
                    self._check_files()
                self._begin(not self._skips_sync or any(map(IS_DURABLE, batch)))
            except Exception as error:
                raise TransactionFailed(self._translate(error)) from error
            try:
                count = len(batch)
                self._execute(batch)
                if not self._is_synced and any(map(IS_DURABLE, batch)):
                    self._cursor.execute("rollback")
                    drop_joined(batch, count)
                    self._begin(is_synced=True)
                    self._execute(batch)
                adds = sum(map(BYTES_ADDED, batch))
                if adds or self._space.is_short:
                    self._space.before_commit(self._writer, adds)
                self._cursor.execute("commit")
            except BaseException as error:
                self._roll_back(error)
                if isinstance(error, sqlite3.Error):
                    raise self._translate(error) from error
                raise
            if self._log is not None and not self._log.is_marked():
                self._mark_log()
        return []

    def _begin(self, is_synced: bool) -> None:
        """Begins a transaction, which SQLite lets choose only before it whether it is synced."""
        if is_synced != self._is_synced:
            self._cursor.execute(SYNC_FULL if is_synced else SYNC_NORMAL)
            self._is_synced = is_synced
        self._cursor.execute("begin immediate")

    def _execute(self, batch: list[Operation]) -> None:
        """Runs the operations."""
        cursor = self._cursor
        execute, fetchall = cursor.execute, cursor.fetchall
        for operation in batch:  # which may grow
            if operation.is_bulk:
                self._execute_bulk(operation)
            else:
                parameters: Any = operation.parameters
                operation.results = results = []
                for statement in operation.statements:
                    sql, in_order, changes = by_position(statement)
                    execute(sql, in_order(parameters))
                    results.append((cursor.rowcount, cursor.lastrowid) if changes else fetchall())
            if operation.look_ups:
                operation.separate_look_ups()
            operation.on_executed()

    def _execute_bulk(self, operation: Operation) -> None:
        """Runs and measures statements, which may each have their own parameters, or a list of
        them."""
        operation.on_begin()
        cursor, began = self._cursor, time.perf_counter()
        given: Any = operation.parameters
        operation.results = []
        each = given if type(given) is list else itertools.repeat(given)
        for statement, parameters in zip(operation.statements, each):
            sql, in_order, changes = by_position(statement)
            if type(parameters) is list:
                cursor.executemany(sql, map(in_order, parameters))
            else:
                cursor.execute(sql, in_order(parameters))
            result = (cursor.rowcount, cursor.lastrowid) if changes else cursor.fetchall()
            operation.results.append(result)
        operation.seconds = time.perf_counter() - began

    def _roll_back(self, error: BaseException) -> None:
        """Rolls a failed transaction back; frees space for the next one if the disk was full."""
        with contextlib.suppress(sqlite3.Error):
            if self._writer.in_transaction:
                self._writer.execute("rollback")
            if is_caused_by(error, SQLITE_FULL, SQLITE_IOERR):
                self._space.make_room(self._writer)

    def _mark_log(self) -> None:
        """Lets a log that has begun anew say to which file it belongs, before its first commit is
        acknowledged.  It may begin anew with just that."""
        assert self._file is not None
        for _ in range(MARK_TRIES):
            try:
                mark = self._file.next_mark()
                if not mark:
                    return
                self._writer.execute("begin immediate")
                self._writer.execute(SET_CONFIG, {"key": "log", "value": mark})
                self._writer.execute("commit")
            except (sqlite3.Error, OSError) as error:
                self._roll_back(error)
                return
            self._file.note_marked()

    def _translate(self, error: Exception) -> Exception:
        """The error that a client sees; one that says that the database is malformed stays."""
        if is_malformed(error):
            self._note_damage(f"the database is malformed{NOTHING_CHANGED}: {BACKUP_HINT}")
            return Unavailable(self._damage)
        return translate_error(error)

    def _note_damage(self, damage: str) -> None:
        """Refuses all transactions from now on: what was acknowledged would be lost."""
        with self._noting:
            if not self._damage:
                self._damage = damage
                log(f"linger: {damage}")

    def _check_files(self) -> None:
        """`Unavailable` if a file was deleted, replaced or overwritten, or is malformed: what is
        written would be lost.

        Only a new stamp of the file makes this necessary.
        """
        if self._damage:
            raise Unavailable(self._damage)
        if self._file is None:
            return
        stamp = self._file.stamp()
        if stamp[:2] != self._checked[:2] and not self._file.is_own():
            self._note_damage(
                f"{os.path.basename(self.path)} was overwritten while in use{NOTHING_CHANGED}:"
                " restart the server, or restore a backup as README, Backup, says"
            )
            raise Unavailable(self._damage)
        for path, inode in self._files.items():
            try:
                same = inode_of(path) == inode
            except OSError:
                same = False
            if not same:
                raise Unavailable(
                    f"{os.path.basename(path)} was deleted or replaced while in use:"
                    " put it back, or restart the server"
                )
        self._checked = stamp

    def check_space(self) -> None:
        """`Full` when space is so short that only takes and deletes may go on."""
        self._space.check()

    # -- reading

    def read(self, *statements: str, **parameters: object) -> list[list[Any]]:
        """The rows of selects that change nothing, all from the moment of the last commit."""
        if self._is_disowned:
            raise Unavailable(FORKED)
        try:
            return self._read(statements, parameters)
        except sqlite3.Error as error:
            raise self._translate(error) from error

    @locked
    def _read(self, statements: Sequence[str], parameters: Mapping[str, object]) -> list[list[Any]]:
        execute = self._reader.execute
        if len(statements) == 1 or self._reader is self._writer:
            return [execute(statement, parameters).fetchall() for statement in statements]
        execute("begin")
        try:
            return [execute(statement, parameters).fetchall() for statement in statements]
        finally:
            execute("rollback")

    @locked
    def _measure(self) -> tuple[int, int]:
        """Bytes of the database, and how many of them are free for new rows."""
        names = ("page_size", "page_count", "freelist_count")
        with contextlib.suppress(sqlite3.Error):
            page, pages, free = (
                self._reader.execute(f"pragma {name}").fetchone()[0] for name in names
            )
            return page * pages, page * free
        return 0, 0

    def size(self) -> int:
        """The size of the database in bytes, -1 for one in memory; as 1.0.1."""
        if self.path == MEMORY:
            return -1
        with contextlib.suppress(OSError):
            return os.stat(self.path).st_size
        return 0

    def disk_usage(self) -> dict[str, int]:
        """The bytes of the file, of its log, and free on their disk, by name in METRICS."""
        if self.path == MEMORY:
            return {}
        usage = {"linger_database_bytes": self.size()}
        with contextlib.suppress(OSError):
            usage["linger_log_bytes"] = os.stat(self.path + "-wal").st_size
            usage["linger_disk_free_bytes"], _ = free_space(self.path)
        return usage

    # -- copies

    def copy(self, path: str) -> None:
        """Copies the database, as of the last commit, into an empty file; commits go on.

        The transaction that reads holds that moment: without it SQLite would begin again with
        every commit.
        """
        if self._is_disowned:
            raise Unavailable(FORKED)
        try:
            with contextlib.closing(sqlite3.connect(path)) as copy:
                copy.execute("pragma synchronous = off")
                if self.path == MEMORY:
                    with self._lock:
                        self._writer.backup(copy)
                else:
                    self._copy_file(copy, path)
                copy.execute("pragma journal_mode = delete").fetchall()  # no log beside it
        except sqlite3.Error as error:
            raise self._translate(error) from error

    def _copy_file(self, copy: sqlite3.Connection, path: str) -> None:
        uri = "file:" + urllib.parse.quote(os.fsencode(self.path)) + "?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as source:
            source.execute("begin")
            pages: int = source.execute("pragma page_count").fetchone()[0]
            size = pages * source.execute("pragma page_size").fetchone()[0]
            free, reserve = free_space(path)
            if free < size + reserve:
                raise Full(f"there is no room on the disk for a copy of {size} bytes")
            failures = self._space.failures

            def check(*_: int) -> None:
                self._check_open()
                if self._space.failures > failures:  # the log cannot be used anew while it is read
                    raise Full("the disk became full while the database was copied")

            source.backup(copy, pages=BACKUP_PAGES, progress=check)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the server stops")

    def open_snapshot(self) -> BinaryIO:
        """A copy of the database in a file that is gone when it is closed.

        It is made beside the database, one at a time.
        """
        with self._copying, writing("a copy"), contextlib.ExitStack() as undo:
            path = self.path + ".copy"
            if self.path == MEMORY:
                directory = undo.enter_context(tempfile.TemporaryDirectory(prefix="linger-"))
                path = os.path.join(directory, "copy")
            undo.callback(remove_files, path, "", "-journal")
            create_file(path)
            self.copy(path)
            return open(path, "rb")

    def hurry(self) -> None:
        """Nothing: a file answers."""

    def close(self) -> None:
        """Writes the log back into the file and closes it; calls after this fail.

        A malformed database and its log stay as they are.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._check_files()
        except Unavailable as error:
            if not self._damage:
                log(f"linger: {error}")
        if self._damage:
            self._abandon()
        else:
            self._close()
        self._unlock()

    def disown(self) -> None:
        """In a forked child: gives up the locks, and never closes what SQLite has open."""
        self._lock = self._write_lock = threading.RLock()
        self._is_disowned = True
        self._damage = FORKED
        if not self._closed:
            self._closed = True
            self._abandon()
            self._unlock()

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _abandon(self) -> None:
        with self._lock:
            abandon(self._reader)
            abandon(self._writer)
        self._space.close()
        self._close_file(forget=False)

    def _close_file(self, forget: bool = True) -> None:
        if self._file is not None:
            self._file.close(forget)

    def _close(self) -> None:
        with self._lock:
            self._reader.close()
            with contextlib.suppress(sqlite3.Error):
                # A program that reads, as Litestream always does, must not delay the end.
                self._writer.execute("pragma busy_timeout = 0")
                if self.path != MEMORY:
                    self._writer.execute(f"pragma synchronous = {self.sync}")
                    self._writer.execute(SET_CONFIG, self._leases("shut"))
                self._writer.execute("pragma wal_checkpoint(truncate)").fetchall()
            self._writer.close()
        self._space.close()
        self._close_file()


def is_caused_by(error: BaseException, *codes: int) -> bool:
    """Whether an error of SQLite has one of the primary result codes."""
    if not isinstance(error, sqlite3.Error):
        return False
    code: Optional[int] = getattr(error, "sqlite_errorcode", None)  # since Python 3.11
    if code is None:
        return str(error) in (ERROR_MESSAGES[code] for code in codes)
    return code & 0xFF in codes


def is_malformed(error: BaseException) -> bool:
    """Whether SQLite found that the database is damaged."""
    is_schema = str(error).startswith("malformed database schema")
    return is_caused_by(error, SQLITE_CORRUPT, SQLITE_NOTADB) or is_schema


def translate_error(error: Exception) -> Exception:
    """The error that a client sees for one of SQLite's; a bug stays what it is."""
    if is_caused_by(error, SQLITE_FULL):
        return Full(f"the disk or the database is full{NOTHING_CHANGED}")
    if isinstance(error, sqlite3.Error):
        return Unavailable(f"the database cannot do this now{NOTHING_CHANGED}: {error}")
    return error


# -- files


def open_or_migrate(path: str) -> None:
    """Creates the file if there is none, and migrates one of 1.0.1; refuses any other untouched."""
    version = read_schema_version(path)
    if not version:
        create_database(path, migrate=version == 0)


def read_schema_version(path: str) -> Optional[int]:
    """The version of a database's schema, 0 for one of 1.0.1, None for an empty file or none.

    `Unavailable` for what this program cannot open.  The header is read by hand: SQLite would at
    once write to a file with a log beside it.
    """
    header = b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        header = file.read(100)
    if not header:
        return None
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise Unavailable(f"{path} is not a database of Linger: {OTHER_DATABASE}")
    version, application = struct.unpack(">I4xI", header[60:72])
    if application == 0 == version and _is_version_1(path):
        return 0
    if application != APPLICATION_ID:
        raise Unavailable(f"{path} is a database of another program: {OTHER_DATABASE}")
    check_schema_version(path, version)
    return int(version)


def check_schema_version(path: str, version: int) -> None:
    """`Unavailable` if this program does not know the schema of a database of Linger."""
    if version < SCHEMA_VERSION:
        raise Unavailable(
            f"{path} has schema {version} of a development version that was never released:"
            f" {OTHER_DATABASE}"
        )
    if version > SCHEMA_VERSION:
        raise Unavailable(
            f"{path} has schema {version}, and Linger {__version__} knows up to"
            f" {SCHEMA_VERSION}: use the newer Linger that made it"
        )


def create_database(path: str, migrate: bool = False) -> None:
    """Creates the database under another name and renames it when it is whole, so that a crash
    leaves no half.

    `migrate` takes over the database of 1.0.1 that is there, which is kept as `<path>.v1` (or
    `.v1.2`, ...).  The rename is on disk before the first commit is: SQLite syncs the directory
    with a new log.
    """
    new = path + ".new"
    with contextlib.ExitStack() as undo:
        undo.callback(remove_files, new, "", "-journal")
        create_file(new)
        with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection:
            if migrate:
                with open(path, "rb") as file:
                    header = file.read(20)
                if header.endswith(ROLLBACK_MODE):
                    set_aside_log(path)
                with contextlib.closing(sqlite3.connect(path)) as original:
                    original.backup(connection)
                connection.execute("pragma journal_mode = delete").fetchall()
                create_schema(connection, BEFORE_MIGRATION, AFTER_MIGRATION)
                connection.execute("vacuum")
            else:
                create_schema(connection)
        if migrate:
            if os.path.exists(path + "-wal"):
                raise Unavailable(f"{path} is in use by another program: its log could not go")
            shutil.copymode(path, new)
            save_original(path)
        set_aside_log(path)  # of a deleted database
        remove_files(path, "-wal", "-shm")
        os.rename(new, path)
        undo.pop_all()


def create_schema(
    connection: sqlite3.Connection, before: Sequence[str] = (), after: Sequence[str] = ()
) -> None:
    """Creates the tables in one transaction; `before` and `after` are those of a migration."""
    connection.execute("begin exclusive")
    for run in schema_runs(before, after):
        connection.execute(*run)
    connection.execute("commit")


def schema_runs(before: Sequence[str] = (), after: Sequence[str] = ()) -> list[Run]:
    """What `create_schema` runs between the beginning and the end of its transaction."""
    return [
        *((statement, {}) for statement in (*before, *SCHEMA, *after)),
        (ADD_CONFIG, {"key": "server_id", "value": os.urandom(16).hex()}),
        (f"pragma application_id = {APPLICATION_ID}", {}),
        (f"pragma user_version = {SCHEMA_VERSION}", {}),
    ]


def save_original(path: str) -> None:
    """Links the file of 1.0.1 to a second name, at once, before it is replaced."""
    for number in itertools.count(1):
        name = f"{path}.v1" if number == 1 else f"{path}.v1.{number}"
        if not os.path.exists(name):
            try:
                os.link(path, name)
            except OSError:  # a file system without links
                shutil.copy2(path, name)
            return
        if os.path.samefile(path, name):
            return  # saved by a start that was killed just after


def _is_version_1(path: str) -> bool:
    """Whether the file holds the tables of Linger 1.0.1; reads nothing but the file itself."""
    uri = "file:" + urllib.parse.quote(os.fsencode(path)) + "?mode=ro&immutable=1"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        found = connection.execute("select name from sqlite_master where type = 'table'")
        return {"config", "messages", "subscriptions"} <= {name for (name,) in found}


def create_file(path: str) -> None:
    """Creates an empty file for its owner only, in place of what a killed process left there."""
    remove_files(path, "", "-journal")
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


@contextlib.contextmanager
def atomic_write(path: str, replace: bool = False) -> Iterator[str]:
    """A file to write that is then renamed to `path`, whole and on disk.

    If writing fails, nothing is left.  Only with `replace` may there be a file already, but no
    database with a log: a server uses it, or SQLite would replay that log into the new file.
    """
    if is_special(path):
        raise Conflict(f"{path} is a directory or a device: choose another name")
    if replace and os.path.lexists(path + "-wal"):
        raise Conflict(f"{path} is a database in use, or was not closed: choose another name")
    if not replace and os.path.lexists(path):
        raise Conflict(f"there is already a file {path}: choose another name, or replace it")
    part = path + ".part"
    with writing(path):
        create_file(part)
        try:
            yield part
            with open(part, "rb+") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())
            os.rename(part, path)
        finally:
            remove_files(part, "", "-journal")


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """`Unavailable` if the system does not let this process write something."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"cannot write {what}: {error.strerror or error}") from error


# ---------------------------------------------------------------------------------------------
# Cluster: the database on an rqlite cluster, which several servers share.  Speaks rqlite's HTTP
# API and runs what the committer gives it; knows no consumers.
#
# A transaction is one request, and so one entry in the log of the cluster: it is executed whole or
# not at all.  It is sent again, to any node, until one answers; TAKE_TURN sees to it that it is
# executed once at most.  What `on_executed` adds belongs to the next transaction, but for look-ups.
# ---------------------------------------------------------------------------------------------

TRIED_RQLITE = "8.26.8"  # versions with which the tests ran
OLDEST_CLUSTER_SQLITE = (3, 41)  # in rqlite: unhex()
CLUSTER_PASSWORD = "LINGER_DB_PASSWORD"  # variable with the password, if the URL has none
NO_LEADER = b"leader not found"  # with status 503, or 500: nobody has taken the request
TURN_REFUSED = "sessions.turn"  # in the error of TAKE_TURN
NODE_ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?")
INSERT_VALUES = re.compile(r"(insert into \w+ \([^()]*\)) values \(([^()]*)\)")
INSERT_ROWS = "{} select {} from json_each(:rows)"
LOOKS_LIKE_BLOB = re.compile(r"[xX]'[0-9a-fA-F]*'")  # some versions take such a text for a blob


class NodeFailed(Exception):
    """A node did not do what it was asked for, or did not say so."""

    def __init__(self, reason: object, may_be_done: bool = True) -> None:
        super().__init__(str(reason))
        self.may_be_done = may_be_done


class ClusterUrl(NamedTuple):
    """Where a cluster is: `http[s]://[user[:password]@]host[:port][,host[:port]...]`."""

    scheme: str
    user: str
    password: str
    nodes: tuple[str, ...]  # host:port of each

    @classmethod
    def parse(cls, url: str) -> ClusterUrl:
        """`BadRequest` if it is not of that form."""
        scheme, _, rest = url.partition("://")
        login, _, hosts = rest.rstrip("/").rpartition("@")
        user, _, password = (urllib.parse.unquote(part) for part in login.partition(":"))
        nodes = hosts.split(",")
        if scheme not in ("http", "https") or not all(map(NODE_ADDRESS.fullmatch, nodes)):
            raise BadRequest(
                "the URL of a cluster must be like http://node1:4001,node2:4001 or"
                f" https://user:password@node1:4001, not {scheme}://{hosts}"
            )
        password = password or os.environ.get(CLUSTER_PASSWORD, "")
        ports = ("" if re.search(r":[0-9]+$", node) else f":{NODE_PORT}" for node in nodes)
        return cls(scheme, user, password, tuple(map(str.__add__, nodes, ports)))

    def __str__(self) -> str:
        """The URL without its password."""
        user = urllib.parse.quote(self.user) + "@" if self.user else ""
        return f"{self.scheme}://{user}{','.join(self.nodes)}"

    def headers(self) -> dict[str, str]:
        """The header lines of each request."""
        if not self.user:
            return {}
        login = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return {"Authorization": f"Basic {login}"}


Content = Union[bytes, BinaryIO]  # of a request: statements, or a file


class Nodes:
    """Sends requests to the nodes of a cluster; for any thread.

    All threads ask the same node, the leader once it is known, until it fails; then the next one.
    """

    def __init__(self, url: ClusterUrl) -> None:
        self.closed = False
        self.patience = CLUSTER_TIMEOUT  # seconds
        self._url = url
        self._headers = url.headers()
        self._connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if url.scheme == "https":
            context = ssl.create_default_context()
            self._connect = functools.partial(http.client.HTTPSConnection, context=context)
        self._place = 0  # of the node that is asked
        self._forwards = False  # whether that node asks the leader, which the URL does not name
        self._idle: collections.deque[tuple[int, http.client.HTTPConnection]] = collections.deque()

    def ask(
        self, path: str, body: Callable[[], bytes], changes: bool = True
    ) -> tuple[list[Any], bool]:
        """Sends `body()`, statements, to one node after another until one answers.

        Returns the results, and whether an earlier try may have been executed.  `Unavailable` if
        surely none was, or if it `changes` nothing, else `OutcomeUnknown`.
        """
        return self._insist(lambda: self._results(self.ask_once(path, body())), changes)

    def download(self, path: str, file: BinaryIO) -> None:
        """Receives a file from a node."""

        def receive() -> None:
            file.seek(0)
            file.truncate()
            self.ask_once(path, b"", TRANSFER_TIMEOUT, file)

        self._insist(receive, changes=False)

    def upload(self, path: str, file: BinaryIO) -> None:
        """Sends a file to a node."""

        def send() -> None:
            file.seek(0)
            self._results(self.ask_once(path, file, TRANSFER_TIMEOUT))

        self._insist(send)

    def _insist(self, attempt: Callable[[], T], changes: bool = True) -> tuple[T, bool]:
        began = time.monotonic()
        may_be_done = False
        while True:
            try:
                return attempt(), may_be_done
            except NodeFailed as error:
                may_be_done = changes and (may_be_done or error.may_be_done)
                if time.monotonic() - began > self.patience or self.closed:
                    kind = OutcomeUnknown if may_be_done else Unavailable
                    known = "it is not known whether this was done: " if may_be_done else ""
                    raise kind(
                        f"{known}the cluster {self._url} does not answer: {error}"
                    ) from error
            time.sleep(NODE_RETRY_DELAY)

    def _results(self, content: bytes) -> list[Any]:
        """The results in an answer, an object for each statement."""
        try:
            answer = json.loads(content)
            results: list[Any] = answer["results"]
        except (ValueError, LookupError, TypeError) as error:
            text = content[:200].decode("utf-8", "replace")
            raise Unavailable(f"{self._url} does not answer as rqlite: {text}") from error
        if "error" in answer:
            raise NodeFailed(answer["error"])
        return results

    def ask_once(
        self, path: str, body: Content, timeout: float = 0.0, into: Optional[BinaryIO] = None
    ) -> bytes:
        """Sends a request to a node and returns its answer, or writes it `into` a file.

        `NodeFailed`; `Unavailable` if another node would give the same answer.
        """
        place = self._place
        if not self._forwards:
            path += "&redirect" if "?" in path else "?redirect"
        try:
            status, headers, content = self._exchange(place, path, body, timeout, into)
        except NodeFailed:
            self._move(place, place + 1)
            raise
        if status in (301, 307, 308):
            self._follow(place, headers.get("Location", ""))
        if status in (401, 403):
            raise Unavailable(f"the cluster {self._url} refuses the user or the password")
        if status == 400:
            raise Unavailable(f"the cluster {self._url} does not understand: {content[:200]!r}")
        if status == 404:
            raise Unavailable(
                f"{self._url} is no rqlite, or one that is too old: Linger was tried with rqlite"
                f" {TRIED_RQLITE}"
            )
        if status == 200:
            return content
        self._move(place, place + 1)
        text = content[:200].decode("utf-8", "replace").strip()
        may_be_done = not content.startswith(NO_LEADER)
        raise NodeFailed(f"{self._url.nodes[place]} says {status}: {text}", may_be_done)

    def _exchange(
        self, place: int, path: str, body: Content, timeout: float, into: Optional[BinaryIO]
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        if isinstance(body, bytes):
            kind, size = "application/json", len(body)
        else:
            kind, size = "application/octet-stream", os.fstat(body.fileno()).st_size
        connection = self._connection(place, (timeout or NODE_TIMEOUT) + size / NODE_RATE)
        headers = {**self._headers, "Content-Type": kind, "Content-Length": str(size)}
        content = b""
        try:
            connection.request("POST" if size else "GET", path, body, headers)
            response = connection.getresponse()
            if into is not None and response.status == 200:
                shutil.copyfileobj(response, into, FILE_CHUNK)
            else:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = f"{self._url.nodes[place]}: {error or type(error).__name__}"
            raise NodeFailed(reason) from error
        except BaseException:  # also Ctrl-C: the rest would be taken for the next answer
            connection.close()
            raise
        if response.will_close or len(self._idle) >= MAX_IDLE_NODE_CONNECTIONS or self.closed:
            connection.close()
        else:
            self._idle.append((place, connection))
        return response.status, response.headers, content

    def _connection(self, place: int, timeout: float) -> http.client.HTTPConnection:
        """An open connection to a node that no other thread uses."""
        with contextlib.suppress(IndexError):
            while True:
                at, connection = self._idle.pop()
                if at == place:
                    connection.timeout = timeout
                    connection.sock.settimeout(timeout)
                    return connection
                connection.close()
        node = self._url.nodes[place]
        connection = self._connect(node, timeout=timeout)
        try:
            connection.connect()
        except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be the name of a host
            connection.close()
            raise NodeFailed(f"{node}: {error}", may_be_done=False) from error
        return connection

    def _follow(self, place: int, location: str) -> NoReturn:
        """Asks the leader from now on, if the URL names it; no other gets the password."""
        leader = urllib.parse.urlsplit(location).netloc.rpartition("@")[2]
        if leader in self._url.nodes:
            self._move(place, self._url.nodes.index(leader))
        else:
            self._forwards = True
        raise NodeFailed(f"the leader is at {leader}", may_be_done=False)

    def _move(self, failed: int, place: int) -> None:
        """Asks another node from now on, unless another thread has moved on already."""
        if self._place == failed:
            self._place = place % len(self._url.nodes)
            self._forwards = False

    def close(self) -> None:
        """Lets requests under way fail early."""
        self.closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop()[1].close()


class Cluster:
    """The database on an rqlite cluster: what it has answered is on the disks of most nodes.

    Only the committer thread transacts; any thread reads.
    """

    is_shared = True

    def __init__(self, url: str, create: bool = True) -> None:
        """Opens or creates the database at `url`; `LingerError` says why it cannot."""
        require_posix("a server of Linger")
        parsed = ClusterUrl.parse(url)
        self.path = str(parsed)
        self._nodes = Nodes(parsed)
        self._session = ""
        self._turn = 0  # the session's last transaction
        self._now: Callable[[], float] = time.time
        self._copying = threading.Lock()  # one copy is made at a time
        self._is_disowned = False
        try:
            self._open(create)
            (leases,) = self.read(GET_CONFIG, key="leases")
            self.first_lease = int(leases[0][0].split()[0]) if leases else 0  # of a copied file
        except BaseException:
            self._nodes.close()
            raise
        disown_in_children(self)

    def _open(self, create: bool) -> None:
        """Creates the tables unless they are there; other servers may do the same meanwhile."""
        if not self._is_created():
            if not create:
                raise NotFound(f"there is no database of Linger at {self.path}")
            body = encode_request(encode_statement(*run) for run in schema_runs())
            with contextlib.suppress(OutcomeUnknown):
                self._nodes.ask("/db/request?transaction", lambda: body)
            if not self._is_created():
                raise Unavailable(f"the tables of Linger could not be created in {self.path}")

    def _is_created(self) -> bool:
        """Whether the database is one of Linger; `Unavailable` if it is of another program."""
        ((sqlite, count),), ((application,),), ((version,),) = self.read(
            IDENTIFY, "pragma application_id", "pragma user_version"
        )
        if tuple(map(int, sqlite.split(".")[:2])) < OLDEST_CLUSTER_SQLITE:
            raise Unavailable(
                f"the rqlite at {self.path} has SQLite {sqlite} and is too old: Linger needs SQLite"
                f" 3.41 in it, and was tried with rqlite {TRIED_RQLITE}"
            )
        if application == APPLICATION_ID:
            check_schema_version(self.path, version)
            return True
        if count:
            raise Unavailable(f"{self.path} is a database of another program: {OTHER_DATABASE}")
        return False

    # -- writing

    def join(self, now: Callable[[], float]) -> tuple[str, float]:
        """Begins a session and returns the record of broker time.

        If servers run, this awaits the record that one of them makes for the new session, and that
        names it.  Without a leader it may come late, but it is not older than the session.
        """
        self._now = now
        ((others,),) = self.read(COUNT_SERVING)[0]
        began = time.monotonic()
        self._begin_session()
        deadline = time.monotonic() + JOIN_TIMEOUT
        while True:
            (rows,) = self.read(GET_CONFIG, key="time")
            record = rows[0][0] if rows else ""
            if self._session in record:
                return record, time.monotonic() - began
            if not others or time.monotonic() > deadline:
                return record, ANY_AGE
            time.sleep(NODE_RETRY_DELAY)

    def _begin_session(self) -> None:
        self._session, self._turn = os.urandom(8).hex(), 0
        parameters = {"session": self._session, "ttl": SESSION_TTL}
        body = encode_request(
            encode_statement(text, parameters) for text in (FORGET_SESSIONS, BEGIN_SESSION)
        )
        self._nodes.ask("/db/request?transaction", lambda: body)

    def transact(self, batch: list[Operation]) -> list[Operation]:
        """Runs operations in one transaction; see `Transactions`.

        A look-up that `on_executed` adds runs at once.
        """
        for operation in batch:
            operation.results = []
            if operation.is_bulk:
                operation.on_begin()
        runs = [list(_runs_of(operation)) for operation in batch]
        if any(runs):
            results = iter(self._execute([run for each in runs for group in each for run in group]))
            for operation, each in zip(batch, runs):
                count = sum(map(len, each))
                _set_results(operation, each, list(itertools.islice(results, count)))
        count = len(batch)
        for operation in batch[:count]:
            if operation.look_ups and operation.error is None:
                operation.separate_look_ups()
            if operation.error is None:
                try:
                    operation.on_executed()
                except Exception:  # a bug; what was committed must not run again
                    log(traceback.format_exc())
        late = [added for added in batch[count:] if not _only_reads(added)]
        batch[count:] = [added for added in batch[count:] if _only_reads(added)]
        self._look_up(batch[count:])
        return late

    def _execute(self, runs: list[Run]) -> list[Any]:
        """The results of statements that run in one transaction."""

        def encode() -> bytes:
            now = self._now()
            turn = {"session": self._session, "turn": self._turn + 1, "now": now}
            return encode_request(
                encode_statement(statement, parameters, now)
                for statement, parameters in ((TAKE_TURN, turn), *runs)
            )

        while True:
            turn_before = self._turn
            try:
                answer, repeated = self._nodes.ask("/db/request?transaction&timings", encode)
            except LingerError as error:
                raise TransactionFailed(error) from error
            refusal = answer[0].get("error", "")
            if not refusal:
                break
            if TURN_REFUSED not in refusal:
                raise TransactionFailed(Unavailable(f"the database cannot do this now: {refusal}"))
            self._find_turn()
            if repeated:
                raise TransactionFailed(
                    OutcomeUnknown("this was probably done, but the cluster's answer was lost")
                )
        errors = [result["error"] for result in answer if "error" in result]
        if errors and self._find_turn() == turn_before:
            raise Unavailable(f"the database cannot do this now{NOTHING_CHANGED}: {errors[0]}")
        self._turn = turn_before + 1
        return answer[1:]

    def _find_turn(self) -> int:
        """Reads the session's last turn: an earlier transaction, of which nothing was heard, may
        have it.  Begins a new session if it is gone: forgotten, or restored from a backup."""
        try:
            (rows,) = self.read(GET_TURN, session=self._session)
            if rows and rows[0][0] >= self._turn:
                self._turn = rows[0][0]
            else:
                self._begin_session()
        except LingerError as error:
            raise TransactionFailed(error) from error
        return self._turn

    def _look_up(self, operations: Sequence[Operation]) -> None:
        """Runs operations that only read."""
        runs = [run for each in operations for group in _runs_of(each) for run in group]
        try:
            results = self._query(runs)
        except LingerError as error:
            for operation in operations:
                operation.error = error
            return
        for operation in operations:
            operation.results = results[: len(operation.statements)]
            del results[: len(operation.statements)]

    def check_space(self) -> None:
        """Nothing: the nodes have their own disks."""

    # -- reading

    def read(self, *statements: str, **parameters: object) -> list[list[Any]]:
        """The rows of selects, all from the same moment, as the leader has them."""
        if self._is_disowned:
            raise Unavailable(FORKED)
        return self._query([(statement, parameters) for statement in statements])

    def _query(self, runs: Sequence[Run]) -> list[list[Any]]:
        if not runs:
            return []
        body = encode_request(encode_statement(*run) for run in runs)
        path = "/db/query?transaction&level=weak"
        results, _ = self._nodes.ask(path, lambda: body, changes=False)
        for result in results:
            if "error" in result:
                raise Unavailable(f"the database cannot do this now: {result['error']}")
        return [_rows_of(result) for result in results]

    def size(self) -> int:
        """The size of the database in bytes."""
        return int(self.read(DATABASE_SIZE)[0][0][0])

    def disk_usage(self) -> dict[str, int]:
        """Only the bytes of the database: the disks are those of the nodes."""
        return {"linger_database_bytes": self.size()}

    # -- copies

    def copy(self, path: str) -> None:
        """Writes the database, as the leader has it, into a file from which a server can start."""
        if self._is_disowned:
            raise Unavailable(FORKED)
        with open(path, "wb") as file:
            self._nodes.download("/db/backup", file)
        with contextlib.closing(sqlite3.connect(path)) as copy:
            copy.execute("pragma journal_mode = delete").fetchall()  # no log beside it
            copy.execute(CLEAR_SESSIONS)
            copy.commit()

    def open_snapshot(self) -> BinaryIO:
        """The same in a file that is gone when it is closed; one is made at a time."""
        with self._copying, writing("a copy"), contextlib.ExitStack() as undo:
            directory = undo.enter_context(tempfile.TemporaryDirectory(prefix="linger-"))
            path = os.path.join(directory, "copy")
            self.copy(path)
            return open(path, "rb")

    def load(self, file: BinaryIO) -> None:
        """Replaces the database, which must be empty, by the one in a file without a log."""
        (found,) = self.read(FIND_STORED)
        if found:
            raise Conflict(f"{self.path} is not empty: it has {', '.join(k for (k,) in found)}")
        self._nodes.upload("/db/load", file)

    def hurry(self) -> None:
        """Lets calls fail that no node answers within a second."""
        self._nodes.patience = STOP_TIMEOUT / 2

    def close(self) -> None:
        """Ends the session; calls after this fail."""
        if self._nodes.closed:
            return
        end = encode_request([encode_statement(END_SESSION, {"session": self._session})])
        with contextlib.suppress(NodeFailed, LingerError):
            self._nodes.ask_once("/db/request", end)
        self._nodes.close()

    def disown(self) -> None:
        """In a forked child: lets each call fail."""
        self._is_disowned = True
        self._nodes.close()


def is_cluster(path: str) -> bool:
    """Whether it is the URL of a cluster, and not the path of a file."""
    return path.startswith(("http://", "https://"))


def open_store(path: str, sync: str = "full", max_size: int = 0) -> Transactions:
    """The database in a file, or at the URL of a cluster; the other arguments are of `Store`."""
    if not is_cluster(path):
        return Store(path, sync, max_size)
    if sync != "full":
        raise BadRequest("sync is for a file: the nodes of a cluster always sync")
    if max_size:
        raise BadRequest("max-db-size is for a file: the nodes of a cluster have their own disks")
    return Cluster(path)


def copy_database(source: str, target: str) -> int:
    """Copies a database that no server uses, of a file or a cluster, with all that is in it, to a
    new file or an empty cluster; returns the number of messages.

    `Conflict` if there is something in the target, or a server uses one of them.
    """
    with contextlib.ExitStack() as stack:
        store = _open_unused(source, is_new=False, stack=stack)
        if is_cluster(target):
            cluster = cast(Cluster, _open_unused(target, is_new=True, stack=stack))
            cluster.load(stack.enter_context(store.open_snapshot()))
        else:
            with atomic_write(os.path.abspath(target)) as part:
                store.copy(part)
        return int(store.read(COUNT_MESSAGES)[0][0][0])


def _open_unused(path: str, is_new: bool, stack: contextlib.ExitStack) -> Transactions:
    """Opens the database of a stopped server.  A file is locked; servers on a cluster answer when
    another one joins."""
    if is_cluster(path):
        store: Transactions = Cluster(path, create=is_new)
    elif os.path.exists(path):
        store = Store(path)
    else:
        raise NotFound(f"there is no database {path}")
    stack.callback(store.close)
    _, max_age = store.join(time.time)
    if max_age < ANY_AGE:  # a server has answered
        raise Conflict(f"a server uses {store.path}: stop it first")
    return store


# -- statements and results as rqlite has them


def _runs_of(operation: Operation) -> Iterator[list[Run]]:
    """The runs of each statement of an operation: several if it has a list of parameters."""
    parameters: Any = operation.parameters
    if type(parameters) is not list:
        parameters = itertools.repeat(parameters)
    for statement, given in zip(operation.statements, parameters):
        if type(given) is not list:
            yield [(statement, given)]
        elif len(given) > 1 and (insert := _insert_of_rows(statement)):
            names = _translate(statement).names
            rows = [{name: _encodable(row[name]) for name in names} for row in given]
            yield [(insert, {"rows": json.dumps(rows)})]
        else:
            yield [(statement, row) for row in given]


def _encodable(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


@functools.lru_cache(STATEMENT_CACHE)
def _insert_of_rows(statement: str) -> str:
    """A statement that inserts all `:rows`, a JSON array, in place of one for each row; empty if
    there is none.  It takes rqlite a quarter of the time."""
    found = INSERT_VALUES.fullmatch(" ".join(statement.split()))
    if not found:
        return ""
    values = re.sub(r":(\w+)", r"json_extract(value, '$.\1')", found[2])
    values = values.replace("json_extract(value, '$.body')", "unhex(json_extract(value, '$.body'))")
    return INSERT_ROWS.format(found[1], values)


def _only_reads(operation: Operation) -> bool:
    return all(_translate(statement).only_reads for statement in operation.statements)


class Translation(NamedTuple):
    """A statement as rqlite takes it."""

    text: str
    names: tuple[str, ...]  # of its parameters
    only_reads: bool


@functools.lru_cache(STATEMENT_CACHE)
def _translate(statement: str) -> Translation:
    """A blob goes to rqlite in hexadecimal digits, and a part of one comes back so."""
    names = tuple(dict.fromkeys(re.findall(r":(\w+)", statement)))
    text = statement.strip()
    if not text.startswith("create"):  # a trigger has comments
        text = " ".join(text.split())
    text = re.sub(r":body\b", "unhex(:body)", text)
    text = re.sub(r"substr\(body, [^()]*\)", r"hex(\g<0>) as hex", text)
    return Translation(text, names, text.startswith(("select", "with")))


def encode_statement(statement: str, parameters: Mapping[str, Any], now: float = 0.0) -> str:
    """A statement with its parameters in JSON; `:now` is at least `now`."""
    text, names, _ = _translate(statement)
    values = {}
    for name in names:
        value = _encodable(parameters[name])
        if isinstance(value, str) and LOOKS_LIKE_BLOB.fullmatch(value):
            value = value.encode().hex()
            text = re.sub(rf":{name}\b", f"cast(unhex(:{name}) as text)", text)
        values[name] = value
    if "now" in values:
        values["now"] = max(values["now"], now)
    return json.dumps([text, values] if values else [text])


def encode_request(statements: Iterable[str]) -> bytes:
    """The body of a request."""
    return f"[{', '.join(statements)}]".encode()


def _set_results(operation: Operation, runs: Sequence[list[Run]], results: list[Any]) -> None:
    """Gives an operation the results of its statements; those of one that ran often are added.

    A statement that cannot be prepared ends no transaction in rqlite.
    """
    errors = [result["error"] for result in results if "error" in result]
    if errors:
        operation.error = OutcomeUnknown(f"the database could do only a part of this: {errors[0]}")
        return
    if operation.is_bulk:
        operation.seconds = sum(result.get("time", 0.0) for result in results)
    operation.results = []
    rest = map(_result_of, results)
    for runs_of_one in runs:
        parts = list(itertools.islice(rest, len(runs_of_one)))
        if len(parts) == 1:
            operation.results += parts
        else:
            changed = sum(part[0] for part in parts)
            operation.results.append((changed, parts[-1][1] if parts else 0))


def _result_of(result: Mapping[str, Any]) -> Any:
    if "columns" in result:
        return _rows_of(result)
    return result.get("rows_affected", 0), result.get("last_insert_id", 0)


def _rows_of(result: Mapping[str, Any]) -> list[Any]:
    """The rows that a select has found; a blob comes in base64."""
    rows = result.get("values") or []
    decode: Optional[Callable[[str], bytes]] = None
    if "blob" in result["types"]:
        column, decode = result["types"].index("blob"), base64.b64decode
    elif "hex" in result["columns"]:
        column, decode = result["columns"].index("hex"), bytes.fromhex
    if decode is not None:
        for row in rows:
            row[column] = decode(row[column])
    return list(map(tuple, rows))


# ---------------------------------------------------------------------------------------------
# Time: every duration is measured in broker time.  It advances with elapsed time, never steps,
# and goes on from what the database has recorded of it; no wall clock can delete, delay or hurry
# a message.
# ---------------------------------------------------------------------------------------------

NEVER = 9e15  # later than any moment; finite, since rqlite takes no infinite numbers
# the clock that also runs while the machine is suspended
ELAPSED: Optional[int] = getattr(
    time, "CLOCK_MONOTONIC_RAW" if sys.platform == "darwin" else "CLOCK_BOOTTIME", None
)


class Clock(Protocol):
    """What the broker asks for the time; tests have their own."""

    def time(self) -> float:
        """The wall clock: seconds since 1970, which anybody may set."""

    def monotonic(self) -> float:
        """Seconds that have passed since some moment, whatever happens to the wall clock."""


class SystemClock:
    """The clocks of this machine."""

    monotonic = staticmethod(
        time.monotonic if ELAPSED is None else functools.partial(time.clock_gettime, ELAPSED)
    )
    """Elapsed seconds, on Linux and macOS with those for which the machine was suspended."""
    time = staticmethod(time.time)
    """The wall clock, seconds since 1970."""


SYSTEM_CLOCK: Clock = SystemClock()


class BrokerClock:
    """Broker time, in seconds, for any thread.

    A new database begins at the wall time.  From then on broker time advances with elapsed time,
    and while no server runs, by what the wall clock says has passed: the database has a record of
    both as they were at one moment.  It is renewed once a minute, when the wall clock has been
    stepped, and when the server stops.
    """

    def __init__(self, source: Clock, record: str, max_age: float) -> None:
        """`record` is the last one of the database, or empty; `max_age`: seconds since it was made,
        at most, whatever the wall clock says."""
        self.source = source
        wall = source.time()
        self._latest = wall  # broker time of the latest transaction
        self._recorded_at = -NEVER  # broker time of the last record,
        self._tried_at = -NEVER  # and of the last try, which may have failed or stored nothing
        self._ahead = NEVER  # by how much the wall clock was ahead of broker time then, seconds
        if record:
            latest, wall_then = map(float, record.split()[:2])
            passed = min(max(wall - wall_then, 0.0), max_age)
            self._latest = latest + passed
            if passed > LONG_DOWNTIME:
                log(
                    f"linger: the system clock says that {passed / 86_400:.0f} days have passed"
                    " since the database was last in use: what was to end meanwhile ends now"
                )
        self._zero = self._latest - source.monotonic()

    def now(self) -> float:
        """Broker time; raises what the source raises."""
        return self._zero + self.source.monotonic()

    def now_or_latest(self) -> float:
        """Broker time, or if the source raises, what it was at the last transaction."""
        with contextlib.suppress(Exception):
            return self.now()
        return self._latest

    def advance(self, moment: float) -> None:
        """Catches up with another server of the cluster, which is ahead."""
        self._zero += max(moment - self.now(), 0.0)

    def record(self, idle: bool = False, closing: bool = False) -> Optional[RecordTime]:
        """The operation that records broker time, if that is due, or the server is `closing`.

        For a server that is `idle` it does nothing while nothing is stored, unless the wall clock
        was stepped: no disk needs to run for that.
        """
        try:
            now, wall = self.now(), self.source.time()
        except BaseException:  # of a test's clock: must not end the committer thread
            return None
        self._latest = now
        stepped = abs(wall - now - self._ahead) > CLOCK_STEP
        if not closing:
            if not stepped and now - self._recorded_at < TIME_RECORD_INTERVAL:  # as usual
                return None
            pause = TIME_RECORD_INTERVAL if idle and not stepped else TIME_RECORD_RETRY
            if now - self._tried_at < pause:
                return None
        self._tried_at = now
        return RecordTime(self, now, wall, always=stepped or not idle)

    def make_record(self, sessions: Iterable[str]) -> RecordTime:
        """The operation that records broker time in any case, for new sessions of a cluster."""
        return RecordTime(self, self.now(), self.source.time(), True, sessions)

    def recorded(self, now: float, wall: float) -> None:
        """Notes, after a commit, what is the record."""
        self._recorded_at, self._ahead = now, wall - now


class RecordTime(Operation):
    """Records broker time and wall time, for the next start."""

    def __init__(
        self,
        clock: BrokerClock,
        now: float,
        wall: float,
        always: bool,
        sessions: Iterable[str] = (),
    ) -> None:
        # Of one length in a file, so that SQLite writes it in place.
        record = " ".join((f"{now:.6f}", f"{wall:.6f}", *sessions))
        super().__init__((RECORD_TIME,), {"time": record, "always": always})
        self._clock = clock
        self._now, self._wall = now, wall

    def on_commit(self) -> None:
        if self.results[0][0]:
            self._clock.recorded(self._now, self._wall)


# ---------------------------------------------------------------------------------------------
# Patterns: topics by their words, which stand between dots.  In a pattern `*` stands for exactly
# one word and `#` for any number of words, as in AMQP's topic exchanges.
# ---------------------------------------------------------------------------------------------

ONE_WORD, ANY_WORDS = "*", "#"


def literal_prefix(pattern: str) -> Optional[str]:
    """What all topics that match a pattern begin with; None if it is a topic without wildcards."""
    words = pattern.split(".")
    wildcards = [n for n, word in enumerate(words) if word in (ONE_WORD, ANY_WORDS)]
    if not wildcards:
        return None
    first = wildcards[0]
    dot = "." if first and words[first] == ONE_WORD else ""
    return ".".join(words[:first]) + dot


class PatternTree:
    """A set of patterns, each with its owners, as a tree of their words; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards the two below
        self._owners: dict[str, set[str]] = {}  # of each pattern
        self._root: dict[Optional[str], Any] = {}  # nodes by word; None: the pattern that ends here

    def __bool__(self) -> bool:
        return bool(self._owners)

    @locked
    def learn(self, rows: Iterable[tuple[str, str]]) -> None:
        """Replaces all by these patterns and owners."""
        self._owners, self._root = {}, {}
        for pattern, owner in rows:
            self._add(pattern, owner)

    @locked
    def add(self, pattern: str, owner: str) -> None:
        """Adds an owner to a pattern."""
        self._add(pattern, owner)

    def _add(self, pattern: str, owner: str) -> None:
        self._owners.setdefault(pattern, set()).add(owner)
        node = self._root
        for word in pattern.split("."):
            node = node.setdefault(word, {})
        node[None] = pattern

    @locked
    def discard(self, pattern: str, owner: str) -> None:
        """Removes an owner from a pattern, which is forgotten with the last one."""
        owners = self._owners.get(pattern, set())
        owners.discard(owner)
        if owners or self._owners.pop(pattern, None) is None:
            return
        node, path = self._root, []
        for word in pattern.split("."):
            path.append((node, word))
            node = node[word]
        del node[None]
        for parent, word in reversed(path):
            if not parent[word]:
                del parent[word]

    @locked
    def match(self, topic: str) -> list[str]:
        """The patterns that match a topic, sorted.

        Looks at each node once at most, with all the places in the topic that it stands for: bit n
        is set if the words up to the node match the first n words.
        """
        before: dict[Optional[str], int] = {}  # the places before each word of the topic
        end = 1  # the place after its last word
        for word in topic.split("."):
            before[word] = before.get(word, 0) | end
            end <<= 1
        before[ONE_WORD] = end - 1
        before[ANY_WORDS] = 0
        found = []
        reached = [(self._root, 1)]
        while reached:
            node, places = reached.pop()
            if places >= end and None in node:
                found.append(node[None])
            for name in node if len(node) < len(before) else before:
                if name in before and name in node:
                    after = (places & before[name]) << 1
                    if after:
                        reached.append((node[name], after))
            if ANY_WORDS in node:
                first = places & -places
                reached.append((node[ANY_WORDS], 2 * end - first))  # and all after it
        return sorted(found)

    def match_json(self, topic: str) -> str:
        """The same as a JSON array; an empty text if there are none."""
        patterns = self.match(topic) if self else []
        return json.dumps(patterns) if patterns else ""


# ---------------------------------------------------------------------------------------------
# Live: what happens to messages, as it happens, for clients that listen.  Knows no sockets and no
# JSON.
#
# Each channel or topic with a listener has a `Feed`: its latest events, which all its readers
# share, each at its own place.  The committer adds events in the order of commits, which costs the
# same for any number of readers; a thread of `Live` wakes those that wait.  Each reader has a
# thread of its own, which may be slow.
#
# `LOOK_UPS` read, in the same transaction, what an event shows and its operation does not know.
# While nobody listens to a channel, no operation has any.
# ---------------------------------------------------------------------------------------------


def condition_of(statement: str) -> str:
    """The condition of the rows that a statement changes or reads."""
    return statement.partition("\nwhere ")[2]


ADDED = "id = last_insert_rowid() and changes() = 1"
CHANGED = "id = :id and changes() = 1"
ADDED_TOGETHER = """changes() > 0
    and id > last_insert_rowid() - :count and id <= last_insert_rowid()"""
SAME = ""  # as the statement, before which it is read
TIMED_OUT = f"state = 1 and {condition_of(MAKE_DUE_READY)}"

# The EVENTS that statements stand for, and the condition of the messages that they change.
REPORTED: tuple[tuple[Sequence[str], str, Sequence[str]], ...] = (
    (("posted",), ADDED, (ADD_MESSAGE, POST_MESSAGE, POST_SCHEDULED)),
    (("posted",), ADDED_TOGETHER, (LAST_ID,)),
    (("posted",), SAME, (PUBLISHED,)),
    (("released",), CHANGED, (RELEASE_MESSAGE, RELEASE_UNCOUNTED, EXHAUST_RELEASED)),
    (("released",), CHANGED, (UNDO_TAKE, RESTORE_MESSAGE)),
    (("rejected",), CHANGED, (REJECT_MESSAGE,)),
    (("deleted",), SAME, (DELETE_MESSAGE, DELETE_LEASED, DELETE_DEAD, DRAIN_READY, DRAIN_HIDDEN)),
    (("deleted",), SAME, (DELETE_WANTED, DELETE_REPLIED, DELETE_CALLED)),
    (("timed_out",), SAME, (EXHAUST_TIMED_OUT, BACK_OFF_TIMED_OUT)),
    (("timed_out",), TIMED_OUT, (MAKE_DUE_READY,)),
    (("expired",), CHANGED, (EXPIRE_MESSAGE,)),
    (("expired",), SAME, (EXPIRE_WAITING, EXPIRE_TIMED_OUT)),
    (("expired", "deleted"), SAME, (DELETE_EXPIRED,)),
    (("dead_lettered",), SAME, (MOVE_DEAD,)),
    (("redriven",), SAME, (REDRIVE_MESSAGES, REDRIVE_MESSAGE)),
)
TARGETS = {  # where messages go that a statement moves
    MOVE_DEAD: "dead",
    REDRIVE_MESSAGES: "coalesce(:to, dead_from)",
    REDRIVE_MESSAGE: "coalesce(:to, dead_from)",
}


class LookUp(NamedTuple):
    """A select that reads the messages that a statement changes."""

    statement: str
    events: Sequence[str]
    sql: str
    after: bool  # whether it runs after the statement


def _look_up(statement: str, events: Sequence[str], condition: str) -> LookUp:
    target = TARGETS.get(statement, "channel")
    watched = " or ".join(map(IS_WATCHED.format, dict.fromkeys(("channel", target))))
    sql = EVENT_ROWS.format(
        target=target, watched=watched, condition=condition or condition_of(statement)
    )
    return LookUp(statement, events, sql, condition in (ADDED, CHANGED))


LOOK_UPS = {
    statement: _look_up(statement, events, condition)
    for events, condition, statements in REPORTED
    for statement in statements
}
EVENT_STATEMENTS = tuple(look_up.sql for look_up in LOOK_UPS.values())


class Listener(Protocol):
    """The client for which a reader reads."""

    def is_disconnected(self) -> bool:
        """Whether it has gone away."""

    def disconnect(self, only_stuck: bool = False) -> None:
        """Breaks its connection; `only_stuck`: if it does not take what is sent."""


class Event:
    """Something that happened to a message; without a name, that it was published."""

    __slots__ = ("cut", "data", "end", "message", "name", "size", "source", "time")

    def __init__(self, name: str, message: Message, cut: int, source: str = "") -> None:
        self.name = "moved" if source else name.replace("_", "-")
        self.message = message  # as it is after the event, or was when it was still there
        self.cut = cut  # bytes of its body that are shown
        self.source = source  # the channel from which it has moved
        self.time = time.monotonic()
        self.size = len(message.body) + EVENT_BYTES
        self.end = 0  # bytes of all events of the feed, up to this one
        self.data = b""  # what its first reader has made of it, for the others


class Feed:
    """The latest events of a channel, topic or pattern; guarded by the lock of `Live`."""

    def __init__(self, feeds: dict[str, Feed], name: str, memory: MemoryBudget) -> None:
        self.feeds = feeds  # those of all channels, of all topics, or of all patterns
        self.name = name
        self.readers: set[Reader] = set()
        self.waiting: set[Reader] = set()  # those that have read all
        self.total = 0  # events ever added, bytes
        self._events: list[Event] = []
        self._first = 0  # the number of the first one that is kept
        self._memory = Reservation(memory)
        self._limit = UNCOUNTED  # bytes kept, beyond which it is to make room

    def end(self) -> int:
        """The number that the next event gets."""
        return self._first + len(self._events)

    def add(self, event: Event) -> Sequence[Reader]:
        """Adds an event; returns the readers that are too slow, which it forgets."""
        self.total += event.size
        event.end = self.total
        self._events.append(event)
        return self._make_room() if self._kept() > self._limit else ()

    def _kept(self) -> int:
        return self.total - self._events[0].end + self._events[0].size if self._events else 0

    def _make_room(self) -> Sequence[Reader]:
        """Forgets readers that are too far behind, and what all others have read.

        This looks at all readers, so it is not done again before more has been added.
        """
        slow = self._remove_slow(self._is_too_slow)
        if not self.readers:
            return slow
        kept = self._forget_read()
        self._limit = kept + max(UNCOUNTED, min(kept, SMALL_AMOUNT))
        try:
            self._memory.resize(self._limit)
        except Unavailable:
            slow += self._remove_slow(lambda reader: self.total - reader.read > SMALL_AMOUNT)
            self._limit = self._forget_read() + SMALL_AMOUNT
            self._memory.force(self._limit if self.readers else 0)
        return slow

    def _is_too_slow(self, reader: Reader) -> bool:
        unread = self.total - reader.read
        if unread <= MAX_BEHIND:
            return False
        oldest = self._events[reader.position - self._first]
        return unread > MAX_BURST or oldest.time < time.monotonic() - BEHIND_TIME

    def _remove_slow(self, is_slow: Callable[[Reader], bool]) -> list[Reader]:
        slow = [reader for reader in self.readers if is_slow(reader)]
        for reader in slow:
            reader.is_slow = True
            self.remove(reader)
        return slow

    def _forget_read(self) -> int:
        """Forgets what all readers have read; returns how many bytes are kept."""
        first = min((reader.position for reader in self.readers), default=self.end())
        del self._events[: first - self._first]
        self._first = first
        return self._kept()

    def read(self, reader: Reader) -> list[Event]:
        """The next events for a reader, but not many at once; none if it has read all."""
        events: list[Event] = []
        for event in itertools.islice(self._events, reader.position - self._first, None):
            if event.end - reader.read > SMALL_AMOUNT and events:
                break
            events.append(event)
        if events:
            reader.position += len(events)
            reader.read = events[-1].end
        return events

    def wait(self, reader: Reader) -> None:
        """Notes that a reader has read all; when all have, nothing needs to be kept."""
        self.waiting.add(reader)
        if len(self.waiting) == len(self.readers) and self._events:
            self._forget_read()
            self._memory.release()
            self._limit = UNCOUNTED

    def remove(self, reader: Reader) -> None:
        """Forgets a reader; with the last one, this feed is forgotten too."""
        self.readers.discard(reader)
        self.waiting.discard(reader)
        if not self.readers:
            self._memory.release()
            if self.feeds.get(self.name) is self:
                del self.feeds[self.name]


class Reader:
    """A place in a feed; one thread calls `events` again and again, and then `close`."""

    def __init__(self, live: Live, feed: Feed, listener: Listener) -> None:
        self.listener = listener
        self.position = feed.end()  # the number of the event that it reads next,
        self.read = feed.total  # and how many bytes there are before it
        self.is_slow = False  # whether it was so far behind that it has missed something
        self.is_silent = False  # whether it is to return without an event, as after SILENCE_LIMIT
        self.waits_since = 0.0
        self._live = live
        self._feed = feed
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()

    def events(self) -> Optional[list[Event]]:
        """Waits for events, and returns some; none if there were none for SILENCE_LIMIT, or after
        `Live.look_again`; None when all streams end.  ConnectionAbortedError: it was too slow, or
        its client has gone.
        """
        while True:
            with self._live.lock:
                events = [] if self.is_slow else self._feed.read(self)
                if events:
                    return events
                if self.is_slow or self.is_silent or self._live.is_closed:
                    break
                self.waits_since = time.monotonic()
                self._feed.wait(self)
            self._wakeups.get()
        self.is_silent = False
        if self.is_slow or self.listener.is_disconnected():
            raise ConnectionAbortedError
        return None if self._live.is_closed else []

    def wake(self) -> None:
        """Lets `events` look again, after it was taken out of the waiting readers."""
        self._wakeups.put(None)

    def close(self) -> None:
        """Ends it; may be repeated."""
        self._live.leave(self, self._feed)


class Live:
    """The feeds of the channels, topics and patterns to which somebody listens.

    Any thread may look whether `channels`, `topics` or `patterns` has any.
    """

    def __init__(self, committer: Committer, clock: BrokerClock, flights: Flights) -> None:
        self.channels: dict[str, Feed] = {}
        self.topics: dict[str, Feed] = {}
        self.patterns: dict[str, Feed] = {}
        self.pattern_tree = PatternTree()  # the names of `patterns`
        self.lock = threading.Lock()  # guards all feeds and readers, and what follows
        self.is_closed = False
        self._committer = committer
        self._clock = clock
        self._flights = flights
        self._watched = ""  # the names of `channels`, as IS_WATCHED wants them
        self._with_news: set[Feed] = set()  # those with events for readers that wait
        self._waker: Optional[Waker] = None  # of the thread, which the first reader starts
        self._is_asleep = False

    def listen(self, kind: str, name: str, listener: Listener, memory: MemoryBudget) -> Reader:
        """A reader of what happens from now on in one of the `channels`, or is published on one
        of the `topics`, or on those that match one of the `patterns` (`kind`)."""
        feeds: dict[str, Feed] = getattr(self, kind)
        with self.lock:
            feed = feeds.get(name)
            if feed is None:
                feed = feeds[name] = Feed(feeds, name, memory)
                self._observe(feed)
            reader = Reader(self, feed, listener)
            feed.readers.add(reader)
            if self._waker is None:
                self._waker = Waker()
                threading.Thread(target=self._run, name="linger-live", daemon=True).start()
            self._waker.wake()
        return reader

    def leave(self, reader: Reader, feed: Feed) -> None:
        """Forgets a reader."""
        with self.lock:
            feed.remove(reader)
            if not feed.readers:
                self._observe(feed)

    def look_again(self, topics: Collection[str]) -> None:
        """Lets the readers of topics, and of patterns that match any, look for what other servers
        have published."""
        with self.lock:
            patterns = {name for topic in topics for name in self.pattern_tree.match(topic)}
            feeds = [feed for name, feed in self.topics.items() if name in topics]
            feeds += [feed for name, feed in self.patterns.items() if name in patterns]
            waiting = [reader for feed in feeds for reader in feed.waiting]
            for feed in feeds:
                feed.waiting.clear()
                for reader in feed.readers:
                    reader.is_silent = True
        for reader in waiting:
            reader.wake()

    def _feeds(self) -> list[Feed]:
        return [*self.channels.values(), *self.topics.values(), *self.patterns.values()]

    def _observe(self, feed: Feed) -> None:
        """After a feed was made or forgotten; perhaps there is another one of its name."""
        if feed.feeds is self.patterns:
            change = self.pattern_tree.add if feed.name in feed.feeds else self.pattern_tree.discard
            change(feed.name, "")
        elif feed.feeds is self.channels:
            self._watched = "".join(f"\n{name}" for name in self.channels) + "\n"
            self._committer.observer = self if self.channels else None

    def close(self) -> None:
        """Ends all streams."""
        with self.lock:
            self.is_closed = True
            feeds = self._feeds()
            waiting = [reader for feed in feeds for reader in feed.waiting]
            busy = [reader for feed in feeds for reader in feed.readers - feed.waiting]
            for feed in feeds:
                feed.waiting.clear()
            if self._waker is not None:
                self._waker.wake()
        for reader in waiting:
            reader.wake()
        for reader in busy:
            reader.listener.disconnect(only_stuck=True)

    # -- in the committer thread

    def prepare(self, operation: Operation) -> None:
        """Adds look-ups to an operation that changes messages; once, since it may run again."""
        if operation.look_ups or LOOK_UPS.keys().isdisjoint(operation.statements):
            return
        given: Any = operation.parameters
        if type(given) is not list and not self._concerns_somebody(operation.statements, given):
            return
        each, count = (given, len(given)) if type(given) is list else (itertools.repeat(given), 1)
        steps: list[tuple[str, Any]] = []
        look_ups: dict[int, LookUp] = {}
        for statement, values in zip(operation.statements, each):
            steps.append((statement, values))
            look_up = LOOK_UPS.get(statement)
            if look_up is not None and type(values) is not list:
                position = len(steps) - (not look_up.after)
                steps.insert(position, (look_up.sql, {**self._parameters(values, count), **values}))
                look_ups[position] = look_up
        operation.look_ups = look_ups
        operation.statements = [statement for statement, _ in steps]
        if type(given) is list:
            operation.parameters = [values for _, values in steps]
        else:
            operation.parameters = {**self._parameters(given, count), **given}

    def _concerns_somebody(self, statements: Sequence[str], given: Mapping[str, Any]) -> bool:
        """Whether somebody may listen to a channel whose messages change; if it is not known by
        now, the look-ups find out."""
        if not TARGETS.keys().isdisjoint(statements):
            return True
        channel = given.get("channel")
        if "id" in given:
            flight = self._flights.find(given["id"], self._clock.now_or_latest())
            channel = None if flight is None else flight.channel
        return channel is None or channel in self.channels

    def _parameters(self, values: Mapping[str, Any], count: int) -> dict[str, Any]:
        """The parameters of a look-up, beside those of its statement."""
        event_bytes = shown_bytes(max(count, values.get("n", 1), values.get("count", 1)))
        now = self._clock.now_or_latest()
        return {"watched": self._watched, "event_bytes": event_bytes, "now": now}

    def report(self, operation: Operation) -> None:
        """Adds the events of an operation to the feeds."""
        for look_up, rows in operation.looked_up:
            for row in rows:
                *columns, _state, cut, to = row  # the last of `columns`: hidden for
                message, source = message_of(tuple(columns)), ""
                if look_up.statement in TARGETS:
                    message, source = _after_move(look_up.statement, message, to), message.channel
                for name in look_up.events:
                    self._add(self.channels, message.channel, Event(name, message, cut, source))
                    if source:
                        self._add(self.channels, source, Event(name, message, cut, source))

    def delivered(self, messages: Sequence[Message], deleted: bool) -> None:
        """Adds the events of a take, which may have `deleted` the messages."""
        cut = shown_bytes(len(messages))
        for message in messages:
            if len(message.body) > cut:
                message = message._replace(body=message.body[: cut + 1])
            for name in ("delivered", "deleted") if deleted else ("delivered",):
                self._add(self.channels, message.channel, Event(name, message, cut))

    def published(self, id: int, topic: str, body: bytes, type: str, headers: str) -> None:
        """Adds the event of a publication; its id is 0 if it is not kept."""
        publication = publication_of(id, topic, 0, type, headers, body[: MAX_EVENT_BODY + 1])
        self._add(self.topics, topic, Event("", publication, MAX_EVENT_BODY))
        for pattern in self.pattern_tree.match(topic) if self.patterns else ():
            self._add(self.patterns, pattern, Event("", publication, MAX_EVENT_BODY))

    def _add(self, feeds: Mapping[str, Feed], name: str, event: Event) -> None:
        feed = feeds.get(name)
        if feed is None:
            return
        with self.lock:
            slow = feed.add(event)
            if feed.waiting:
                self._with_news.add(feed)
                if self._is_asleep and self._waker is not None:
                    self._is_asleep = False
                    self._waker.wake()
        for reader in slow:
            reader.listener.disconnect()
            reader.wake()

    # -- in the thread that wakes readers

    def _run(self) -> None:
        waker = self._waker
        assert waker is not None
        checked_at = time.monotonic()
        while not self.is_closed:
            with self.lock:
                self._is_asleep = not self._with_news
                is_needed = bool(self.channels or self.topics or self.patterns)
            if self._is_asleep:
                left = checked_at + LISTENER_CHECK_INTERVAL - time.monotonic()
                waker.wait(max(left, 0.0) if is_needed else CHANNEL_TTL)
            readers = self._readers_with_news()
            if time.monotonic() >= checked_at + LISTENER_CHECK_INTERVAL:
                checked_at = time.monotonic()
                readers += self._readers_to_check()
            for reader in readers:
                reader.wake()
            time.sleep(min(len(readers) * STREAM_PACE, BEHIND_TIME / 2))
        waker.close()

    def _readers_with_news(self) -> list[Reader]:
        with self.lock:
            self._is_asleep = False
            readers = [reader for feed in self._with_news for reader in feed.waiting]
            for feed in self._with_news:
                feed.waiting.clear()
            self._with_news.clear()
        return readers

    def _readers_to_check(self) -> list[Reader]:
        """Waiting readers whose clients have gone, or are to get a sign of life."""
        with self.lock:
            feeds = self._feeds()
            waiting = [(feed, reader) for feed in feeds for reader in feed.waiting]
        before = time.monotonic() - SILENCE_LIMIT + LISTENER_CHECK_INTERVAL
        found = [
            (f, r) for f, r in waiting if r.waits_since <= before or r.listener.is_disconnected()
        ]
        with self.lock:
            found = [(feed, reader) for feed, reader in found if reader in feed.waiting]
            for feed, reader in found:
                reader.is_silent = True
                feed.waiting.discard(reader)
        return [reader for _, reader in found]


def publication_of(id: int, topic: str, age: int, type: str, headers: str, body: bytes) -> Message:
    """A publication as a message, which is in no channel."""
    return Message(id, "", 0, 0, 0, 0, age, 0, topic, 0, type, body, header_lines=headers)


def shown_bytes(count: int) -> int:
    """How much an event shows of a body, if so many messages change at once."""
    return MAX_EVENT_BODY if count <= MANY_MESSAGES else PREVIEW_BYTES


def _after_move(statement: str, message: Message, to: str) -> Message:
    """A message as it is after MOVE_DEAD, or was moved back."""
    if statement == MOVE_DEAD:
        return message._replace(
            channel=message.dead, dead_from=message.channel, delivered=0, linger=0,
            dead_delivered=message.delivered,
        )  # fmt: skip
    return message._replace(channel=to, dead_from="", dead_reason="", dead_delivered=0, delivered=0)


# ---------------------------------------------------------------------------------------------
# State: what the broker keeps in memory: waiting consumers, channels, timers, counters.
# All of it can be thrown away, for the rows are the truth.  It changes after a commit, in the
# order of commits, so most of it is written by the committer thread only.
# ---------------------------------------------------------------------------------------------

COUNTERS = (
    "msg-add", "msg-get", "delivered", "msg-hide", "msg-show", "msg-timeouts", "msg-retention",
    "msg-touch", "msg-delete", "msg-release", "msg-reject", "msg-dead", "msg-redrive", "publish",
    "publications", "channel-create", "channel-remove", "channel-drain", "subscription-add",
    "subscription-delete",
)  # fmt: skip
SUMS = {"msg-add": "posted", "delivered": "delivered"}  # of EVENTS, in all channels
ALL = ""  # among the channels of `Timers`: no channel has this name
OUTDATED_MOMENTS = 1_000  # entries that `Timers` may keep beyond twice those it needs


class Consumer:
    """A consumer for one `take`, which waits until it is woken, and which any thread may cancel.

    `on_done(operation)` is called once, when its take is over: the result is the messages, or it
    raises.  The lock of the waiting list guards `waiting`, `closed` and `ticket`.
    """

    on_done: DoneCallback
    deleted_rows: Sequence[tuple[Any, ...]] = ()  # what was taken with `auto`, for an undo
    acknowledged = False  # whether the message of `ack` has been deleted
    ticket = 0  # its place in the order of arrival; 0 before it waits
    waiting = False  # whether it is in the waiting list
    closed = False  # whether it must not wait, or not any longer
    deadline = NEVER  # when its wait ends, by the clock of elapsed time

    def __init__(
        self,
        channels: Sequence[str],
        n: int = 1,
        timeout: Optional[int] = None,
        auto: bool = False,
        is_disconnected: Callable[[], bool] = bool,
        memory: Optional[Reservation] = None,
        holder: str = "",
    ) -> None:
        """It takes up to `n` messages, from the first of the channels that has any.

        `timeout`: seconds that they stay hidden, in place of their own; `auto`: they are deleted as
        they are delivered.  `is_disconnected()` tells whether its client has gone away: then it is
        passed over.  It is called in the committer thread, as `on_done` is.  `memory`: where what
        is taken is reserved; without room the take raises `Unavailable`; None: no limit.
        `holder`: what listings of messages in flight call it.
        """
        self.channels = names = list(dict.fromkeys(channels))
        for name in names:
            check_name("channel", name)
        if not 1 <= len(names) <= MAX_CHANNELS_AT_ONCE:
            raise BadRequest(f"1 to {MAX_CHANNELS_AT_ONCE} channels may be asked at once")
        self.n = n
        self.timeout = timeout
        self.auto = auto
        self.is_disconnected = is_disconnected
        self.memory = memory
        self.holder = holder

    def again(self) -> Consumer:
        """A consumer of the same kind, for another take, of one that was not used."""
        consumer = Consumer.__new__(Consumer)
        consumer.__dict__.update(self.__dict__)
        return consumer


class WaitingList:
    """The consumers that wait for each channel, in their order.

    Consumers are added and woken by the committer thread, in the order of commits, and canceled
    by any.  No foreign code runs under the lock.
    """

    def __init__(self, counters: dict[str, int], max_channels: int) -> None:
        self._max_channels = max_channels
        self._lock = threading.RLock()  # guards all below, and the two counters of channels
        self._queues: dict[str, collections.OrderedDict[int, Consumer]] = {}  # none is empty
        self._idle: collections.OrderedDict[str, float] = collections.OrderedDict()  # since when
        self._tickets = itertools.count(1)
        self._counters = counters
        self._closed = False
        self._checked_at = 0.0  # when overdue waits were last looked for
        self.on_first: Callable[[], None] = lambda: None  # called when a consumer waits alone

    @locked
    def add(self, consumer: Consumer) -> bool:
        """Lets a consumer that found nothing wait, in its old place if it had one.

        False if it must not wait; `Unavailable` as `check_room`.  Called in the order of commits,
        so that a message added after the take that found nothing wakes it.
        """
        if consumer.closed or self._closed:
            consumer.closed = True
            return False
        self._check_room(consumer)
        returning = consumer.ticket
        if not returning:
            consumer.ticket = next(self._tickets)
        consumer.waiting = True
        if not self._queues:
            self.on_first()
        for channel in consumer.channels:
            queue = self._queues.get(channel)
            if queue is None:
                queue = self._queues[channel] = collections.OrderedDict()
                if self._idle.pop(channel, None) is None:
                    self._counters["channel-create"] += 1
            queue[consumer.ticket] = consumer
            if returning:
                ahead = itertools.takewhile(lambda ticket: ticket < returning, list(queue))
                for ticket in (returning, *reversed(list(ahead))):
                    queue.move_to_end(ticket, last=False)
        return True

    @locked
    def pop(self, channel: str, now: float) -> Optional[Consumer]:
        """Removes and returns the first consumer of a channel, or None if there is none."""
        queue = self._queues.get(channel)
        if not queue:
            return None
        consumer = next(iter(queue.values()))
        self._remove(consumer, now)
        return consumer

    @locked
    def cancel(self, consumer: Consumer, now: float) -> bool:
        """Ends a wait; False if the consumer is not waiting: its take runs or is over."""
        consumer.closed = True
        if not consumer.waiting:
            return False
        self._remove(consumer, now)
        return True

    @locked
    def close(self) -> None:
        """Lets no further consumer wait."""
        self._closed = True

    @locked
    def consumers(self) -> list[Consumer]:
        """All consumers that wait."""
        consumers = {c.ticket: c for queue in self._queues.values() for c in queue.values()}
        return list(consumers.values())

    def overdue(self, now: float) -> list[Consumer]:
        """Consumers whose waits should have ended by themselves, by the clock of elapsed time;
        looks at most once in WAIT_CHECK_INTERVAL.

        The sleeps of their threads stop while the machine is suspended, and some follow the wall
        clock.
        """
        if now - self._checked_at < WAIT_CHECK_INTERVAL:
            return []
        self._checked_at = now
        return [c for c in self.consumers() if c.deadline + WAIT_GRACE <= now]

    def _remove(self, consumer: Consumer, now: float) -> None:
        """May be repeated, by another thread, after a signal handler has raised anywhere in it."""
        for channel in consumer.channels:
            queue = self._queues.get(channel)
            if queue is not None:
                queue.pop(consumer.ticket, None)
                if not queue:
                    self._idle[channel] = now
                    del self._queues[channel]
        consumer.waiting = False
        self._forget_idle(now)

    def _forget_idle(self, now: float) -> None:
        """Forgets the channels whose last consumer has been gone for long, or that are too many."""
        idle = self._idle
        while idle and (
            len(idle) > MAX_IDLE_CHANNELS or next(iter(idle.values())) <= now - CHANNEL_TTL
        ):
            idle.popitem(last=False)
            self._counters["channel-remove"] += 1

    @locked
    def awaited(self) -> list[str]:
        """The channels for which consumers wait."""
        return list(self._queues)

    @locked
    def count(self, channel: str) -> int:
        """How many consumers wait for a channel."""
        return len(self._queues.get(channel, ()))

    @locked
    def counts(self) -> dict[str, int]:
        """How many consumers wait for each channel that has any."""
        return {channel: len(queue) for channel, queue in self._queues.items()}

    def is_empty(self, channel: Optional[str] = None) -> bool:
        """Whether no consumer waits, for one channel or any; takes no lock.

        If it says so in the committer thread, which alone adds consumers, it is certain.
        """
        return not self._queues if channel is None else channel not in self._queues

    @locked
    def forget_idle(self, now: float) -> None:
        """Forgets the channels for which no consumer has waited for CHANNEL_TTL seconds."""
        self._forget_idle(now)

    @locked
    def channels(self, now: float) -> set[str]:
        """The channels for which consumers wait, or did so less than CHANNEL_TTL seconds ago."""
        self._forget_idle(now)
        return {*self._queues, *self._idle}

    @locked
    def check_room(self, consumer: Consumer) -> None:
        """`Unavailable` if consumers would wait at too many channels with this one."""
        self._check_room(consumer)

    def _check_room(self, consumer: Consumer) -> None:
        new, limit = sum(c not in self._queues for c in consumer.channels), self._max_channels
        if new and len(self._queues) + new > limit:
            raise Unavailable(f"consumers wait at {limit} channels, and none is free")


class Channels:
    """Which channels exist, with copies of their settings and pauses.

    Settings and pauses are written by the committer thread; a setting is never changed in place.
    """

    def __init__(
        self,
        max_channels: int,
        read: Callable[[str], list[list[Any]]],
        clock: BrokerClock,
        is_shared: bool,
    ) -> None:
        self.is_shared = is_shared  # whether other servers may have changed them just now
        self.settings: dict[str, dict[str, Any]] = {}
        self.limited: set[str] = set()  # those with a max-in-flight
        self.pauses: dict[str, float] = {}  # until when; NEVER: until it is ended
        (settings,), (pauses,) = read(ALL_SETTINGS), read(ALL_PAUSES)
        self.learn(settings, pauses)
        self.max_channels = max_channels
        self._read = read
        self._clock = clock
        self._lock = threading.RLock()  # guards the two below, and is held while counting
        self._names: set[str] = set()  # all channels that hold something, and some that did
        self._counted_at = 0.0
        self._count()

    def learn(self, settings: Sequence[Sequence[Any]], pauses: Sequence[tuple[str, float]]) -> None:
        """Takes over the rows of ALL_SETTINGS and ALL_PAUSES."""
        paused = dict(pauses)
        self.pauses.update(paused)  # in place: other threads find in it what stays
        for channel in self.pauses.keys() - paused.keys():
            del self.pauses[channel]
        rows = {row[0]: [row[1:]] for row in settings}
        for channel in {*self.settings, *rows}:
            self.learn_settings(channel, rows.get(channel, ()))

    def learn_settings(self, channel: str, rows: Sequence[Sequence[object]]) -> None:
        """Takes over the row of SETTINGS_OF_CHANNEL, if there is one; other threads see no gap."""
        settings = settings_of(rows[0]) if rows else {}
        if rows:
            self.settings[channel] = settings
        else:
            self.settings.pop(channel, None)
        (self.limited.add if settings.get("max-in-flight") else self.limited.discard)(channel)

    def reserve(self, channel: str) -> None:
        """`Full` if a channel that is to hold something would be one too many.

        A channel that no longer holds anything is noticed only by a count.  Dead channels are not
        checked: the dead letter would be lost.
        """
        if channel not in self._names:
            self._reserve(channel)

    @locked
    def _reserve(self, channel: str) -> None:
        if len(self._names) >= self.max_channels:
            if self._clock.source.monotonic() - self._counted_at >= RECOUNT_INTERVAL:
                self._count()
            if len(self._names) >= self.max_channels and channel not in self._names:
                raise Full(f"there are {self.max_channels} channels, and no more can be made")
        self._names.add(channel)

    def _count(self) -> None:
        (rows,) = self._read(CHANNEL_NAMES)
        self._names = {name for (name,) in rows}.union(self.settings.copy(), self.pauses.copy())
        self._counted_at = self._clock.source.monotonic()


def settings_of(values: Sequence[object]) -> dict[str, Any]:
    """The settings in a row of ALL_SETTINGS: those that are set."""
    named = zip((p.name for p in CHANNEL_PARAMETERS), values)
    return {name: value for name, value in named if value is not None}


class Timers:
    """When something is due next in each channel, and a thread, the ticker, that has it processed
    at that moment.

    Callers process what is due in their channel before they look at its rows; the ticker does it
    for consumers that wait, and for messages that no consumer asks for.  The channel `ALL` stands
    for pauses, and for dedup keys and replies that are old.
    """

    def __init__(self, on_tick: Callable[[bool], None], clock: BrokerClock) -> None:
        """`on_tick(is_due)` is called at least once in TICK_INTERVAL."""
        self.next_due = NEVER  # the earliest moment of all
        self.tick_at = NEVER  # when the ticker is to tick for another reason; it alone writes this
        self._on_tick = on_tick
        self._clock = clock
        self._lock = threading.RLock()  # guards the moments, `_sleeps_until` and the waker
        self._moments: dict[str, float] = {}  # of each channel
        self._heap: list[tuple[float, str]] = []  # the same, in order, and some that are outdated
        self._waker = Waker()
        self._sleeps_until = NEVER  # when the ticker wakes by itself, in broker time
        self._swept_at = clock.now_or_latest()  # when messages were last processed, due or not
        self._ticked_at = time.monotonic()
        self._stopping = False
        self._thread = threading.Thread(target=self._tick, name="linger-ticker", daemon=True)

    def start(self) -> None:
        """Starts the ticker."""
        self._thread.start()

    @locked
    def stop(self) -> None:
        """Tells the ticker to end."""
        self._stopping = True
        self._waker.wake()

    def join(self) -> None:
        """Waits until the ticker has ended."""
        self._thread.join()
        self._waker.close()

    def is_alive(self) -> bool:
        """Whether the ticker runs."""
        return self._thread.is_alive()

    def has_ticked(self, seconds: float) -> bool:
        """Whether the ticker has come round within so many seconds."""
        return time.monotonic() - self._ticked_at < seconds

    def is_stopping(self) -> bool:
        """Whether the ticker was told to end."""
        return self._stopping

    def schedule(self, channel: str, moment: float) -> None:
        """Notes, after a commit, that something comes due in a channel at a moment."""
        if moment < self._moments.get(channel, NEVER):
            self.set_next(channel, moment)

    def schedule_rows(self, rows: Iterable[Sequence[Any]]) -> None:
        """The same for rows of a channel and moments, None if there is nothing."""
        for channel, *moments in rows:
            for moment in moments:
                if moment is not None:
                    self.schedule(channel, moment)

    @locked
    def set_next(self, channel: str, moment: float) -> None:
        """Sets the moment when something is due next in a channel; NEVER for none."""
        if moment == NEVER:
            self._moments.pop(channel, None)
        else:
            heapq.heappush(self._heap, (moment, channel))
            self._moments[channel] = moment
        if len(self._heap) > 2 * len(self._moments) + OUTDATED_MOMENTS:
            self._heap = [(moment, channel) for channel, moment in self._moments.items()]
            heapq.heapify(self._heap)
        self.next_due = moment = self._earliest()
        if moment < self._sleeps_until:
            self._sleeps_until = moment  # it need not be woken again for a later one
            self._waker.wake()

    def _earliest(self) -> float:
        while self._heap:
            moment, channel = self._heap[0]
            if self._moments.get(channel) == moment:
                return moment
            heapq.heappop(self._heap)
        return NEVER

    def is_due(self, channel: str, now: float) -> bool:
        """Whether something may be due in a channel."""
        return self._moments.get(channel, NEVER) <= now

    @locked
    def due_channels(self, now: float) -> list[str]:
        """Up to MAX_DUE_CHANNELS in which something may be due, the earliest first.

        Takes nothing off the heap: a signal handler that raises would lose it.
        """
        found: dict[str, None] = {}
        heap, ahead = self._heap, [(moment, 0) for moment in self._heap[:1]]
        while ahead and ahead[0][0][0] <= now and len(found) < MAX_DUE_CHANNELS:
            (moment, channel), place = heapq.heappop(ahead)
            if self._moments.get(channel) == moment:
                found[channel] = None
            for child in range(2 * place + 1, min(2 * place + 3, len(heap))):
                heapq.heappush(ahead, (heap[child], child))
        return list(found)

    def _tick(self) -> None:
        while not self._stopping:
            self._ticked_at = time.monotonic()
            try:
                self._waker.wait(self._time_to_sleep())
                if not self._stopping:
                    self._on_tick(self._begin_sweep())
            except Exception as error:  # of the database, or of the clock
                log(f"linger: messages that are due are processed later: {error!r}")
                if not self._stopping:
                    self._waker.wait(TICKER_RETRY_DELAY)

    def _time_to_sleep(self) -> float:
        """Seconds until something is due, or the clocks are to be looked at."""
        now = self._clock.now()
        with self._lock:
            tick = min(self.next_due, self.tick_at, now + TICK_INTERVAL)
            self._sleeps_until = max(tick, now)
            return 0.0 if self._stopping else self._sleeps_until - now

    def _begin_sweep(self) -> bool:
        """Notes that messages are processed now, if something is due or they have not been looked
        at for CHANNEL_TTL; returns whether that is so."""
        now = self._clock.now()
        if now < min(self.next_due, self._swept_at + CHANNEL_TTL):
            return False
        self._swept_at = now
        return True


# ---------------------------------------------------------------------------------------------
# Operations: one class for each kind of call, with its statements, its effects and its result.
# They know rows, consumers and counters, and nothing of threads: the committer calls them.
# ---------------------------------------------------------------------------------------------

STATES = ("ready", "hidden", "delayed", "blocked")  # as listings number them; hidden: in flight
DEAD_REASONS = ("deliver", "linger", "reject")
BURY_DEAD = (DEAD_COUNTS, MOVE_DEAD, DELETE_DEAD)


class PieceSize:
    """How many rows a piece of bulk work may touch: fewer after one that took long."""

    def __init__(self, rows: int) -> None:
        self.rows = min(rows, PIECE_ROWS)

    def adapt(self, seconds: float, is_full: bool) -> None:
        """Adapts the size after a piece that took `seconds`; `is_full`: it used all its rows."""
        if seconds > PIECE_TIME:
            self.rows = max(self.rows // 2, 1)
        elif is_full:
            self.rows = min(self.rows * 2, PIECE_ROWS)


class State:
    """What operations read and change in memory, and how they wake consumers."""

    def __init__(
        self,
        committer: Committer,
        clock: BrokerClock,
        channels: Channels,
        timers: Timers,
        events: EventCounts,
    ) -> None:
        self.committer = committer
        self.clock = clock
        self.channels = channels
        self.timers = timers
        self.events = events
        self.patterns = PatternTree()  # to which channels are subscribed
        self.retention: dict[str, tuple[Optional[int], Optional[int]]] = {}  # keep and keep_for
        self.flights = Flights()
        self.live = Live(committer, clock, self.flights)
        self.queue_times = Histogram(LONG_SECONDS)
        self.flight_times = Histogram(LONG_SECONDS)
        # Each is written by the committer thread only, but those of channels by the waiting list.
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.waiting = WaitingList(self.counters, channels.max_channels)
        self.due_piece = PieceSize(PIECE_ROWS)
        self.processing: dict[str, ProcessDue] = {}  # the pieces submitted and not done, by channel
        self.backlogs: set[str] = set()  # channels of which the last piece has not done all
        # Takes of woken consumers that are not done, by channel; only on a cluster.
        self.taking: Optional[collections.Counter[str]] = None

    def learn_retention(self, rows: Sequence[tuple[str, Optional[int], Optional[int]]]) -> None:
        """Takes over the rows of ALL_RETENTION."""
        self.retention = {topic: (keep, keep_for) for topic, keep, keep_for in rows}

    def process_due(self, channel: str, now: float) -> ProcessDue:
        """Submits a piece of what is due in a channel, unless one is submitted already.

        So it is done before what the caller submits next, and once, however many see it.
        """
        piece = self.processing.get(channel)
        if piece is None or piece.now < now - PIECE_TIME:
            kind = EndPausesAndKeys if channel == ALL else ProcessDue
            rows = self.due_piece.rows // (len(self.processing) + 1)
            n = max(rows // 2, 1)  # up to n by their expiry, and n by their due time
            piece = self.processing[channel] = kind(self, channel, now, n)
            self.committer.submit(piece)
        return piece

    def count_taking(self, channel: str, change: int) -> None:
        """Counts the takes of consumers that were woken for a channel."""
        if self.taking is not None:
            self.taking[channel] += change
            if not self.taking[channel]:
                del self.taking[channel]  # clients may use ever new names

    def wake(self, channel: str, count: int, now: float, join: bool = False) -> int:
        """Wakes up to `count` consumers of a channel to take a message; returns how many.

        Each take gets its place here, in the transaction under way (`join`) or the next one, so
        that consumers are served in order.
        """
        if self.waiting.is_empty(channel) or channel in self.channels.pauses:
            return 0
        submit = self.committer.join_transaction if join else self.committer.submit
        woken = 0
        while woken < count:
            consumer = self.waiting.pop(channel, now)
            if consumer is None:
                break
            try:
                gone = consumer.is_disconnected()
            except BaseException as error:  # foreign code: the consumer gets it as its error
                self.committer.submit(EndWait(consumer, error))
                continue
            if gone:
                self.committer.submit(EndWait(consumer))
            else:
                submit(Take(self, consumer, now, woken_by=channel))
                woken += 1
        return woken

    def wake_for_all(self, channel: str, counts: Sequence[Sequence[int]], now: float) -> None:
        """Wakes consumers for all ready messages of a channel, from its row of CHANNEL_COUNTS."""
        if counts:
            self.wake(channel, counts[0][0], now)

    def messages_added(
        self, channel: str, messages: Sequence[Mapping[str, Any]], now: float, woken: int
    ) -> None:
        """After messages were added to a channel; wakes consumers for them, but for the `woken`
        ones that were woken before."""
        self.events[channel]["posted"] += len(messages)
        ready = 0
        for message in messages:
            if message["expires_at"]:
                self.timers.schedule(channel, message["expires_at"])
            if message["state"]:
                self.timers.schedule(channel, message["due_at"])
            elif message.get("group"):  # it may be blocked
                self.wake(channel, 1, now)
            else:
                ready += 1
        if ready > woken:
            self.messages_ready(channel, ready - woken, now)

    def messages_ready(self, channel: str, count: int, now: float) -> None:
        """After messages became ready; what no consumer waits for is counted as shown."""
        self.counters["msg-show"] += count - self.wake(channel, count, now)

    def flights_ended(self, channel: str, count: int, now: float) -> None:
        """After messages of a channel have left their flight: in a limited one others may begin."""
        if channel in self.channels.limited:
            self.wake(channel, count, now)

    def dead_buried(self, channel: str, results: Sequence[Any], now: float) -> None:
        """After BURY_DEAD for messages of a channel, from its results."""
        dead, _, (deleted, _) = results
        self.counters["msg-delete"] += deleted
        for target, count in dead:
            self.counters["msg-dead"] += count
            self.events[channel]["dead_lettered"] += count
            self.messages_ready(target, count, now)

    def unblock_next(self, channel: str, now: float) -> None:
        """Unblocks the next message of a group, after statements that may have taken one out of it.

        In the same transaction, so that no other look at what is due is needed.
        """
        self.committer.join_transaction(ProcessDue(self, channel, now, FIRST_PIECE))

    def messages_deleted(self, channel: str, ids: Sequence[int], now: float) -> None:
        """After a client has deleted messages of a channel."""
        count = len(ids)
        self.counters["msg-delete"] += count
        self.events[channel]["deleted"] += count
        for flight in map(self.flights.pop, ids):
            if flight is not None:
                self.flight_times.observe(now - flight.began)
        if channel in self.channels.limited:
            self.wake(channel, count, now)


class Change(Operation):
    """A change whose effect is short: `effect` gets the results after the commit."""

    def __init__(
        self,
        statements: Sequence[str],
        parameters: Parameters,
        effect: Callable[[list[Any]], None],
    ) -> None:
        super().__init__(statements, parameters)
        self._effect = effect

    def on_commit(self) -> None:
        self._effect(self.results)


# -- producing

POST_KEYED = (FIND_DEDUP, FIND_UNIQUE, POST_MESSAGE, SAVE_DEDUP)
KEYED_PLACE = POST_KEYED.index(POST_MESSAGE)
CHANNEL_IS_FULL = "the channel is at its high-level mark of {} messages"


class Post(Operation):
    """Adds a message to a channel."""

    _place = 0  # of the statement that adds it, among the others
    _is_woken: bool  # whether a consumer takes it in the same transaction

    def __init__(self, state: State, message: dict[str, Any]) -> None:
        """`message`: the parameters of POST_MESSAGE."""
        statements: Sequence[str] = (ADD_MESSAGE,)
        if any(EXTRAS_OF(message)):
            statements = (POST_MESSAGE,)
            if any(KEYS_OF(message)):
                statements, self._place = POST_KEYED, KEYED_PLACE
        super().__init__(statements, message)
        self.size = len(message["body"])
        self.adds = self.size + MESSAGE_OVERHEAD
        self._state = state
        self._message = message

    def on_executed(self) -> None:
        """A waiting consumer takes the message in the same transaction.

        One that begins to wait in that transaction is woken after it, by `on_commit`.
        """
        message, state = self._message, self._state
        self._is_woken = False
        if state.waiting.is_empty(message["channel"]):
            return
        if self._is_added() and not message["state"]:
            self._is_woken = state.wake(message["channel"], 1, message["now"], join=True) > 0

    def on_commit(self) -> None:
        if self._is_added():
            message = self._message
            self._state.messages_added(
                message["channel"], (message,), message["now"], self._is_woken
            )

    def _is_added(self) -> bool:
        return bool(self.results[self._place][0])

    def result(self) -> PostResult:
        result = _post_result(self.rows())
        if result is None:
            raise Full(CHANNEL_IS_FULL.format(self._message["hlm"]))
        return result


class PostBatch(Operation):
    """Adds messages to a channel in order, all or none; the result is their ids."""

    is_bulk = True

    def __init__(self, state: State, messages: list[dict[str, Any]]) -> None:
        """`messages`: the parameters of POST_MESSAGE for each."""
        first = messages[0]
        self._hlm = first["hlm"]
        self._keyed = any(map(any, map(KEYS_OF, messages)))
        if self._keyed:
            statements = POST_KEYED * len(messages)
            parameters: list[Any] = [message for message in messages for _ in POST_KEYED]
        else:
            has_extras = any(map(any, map(EXTRAS_OF, messages)))
            statements = (POST_MESSAGE if has_extras else ADD_MESSAGE, LAST_ID)
            parameters = [messages, {"count": len(messages)}]
        fits = {"channel": first["channel"], "hlm": self._hlm, "count": len(messages)}
        super().__init__((CHECK_BATCH_FITS, *statements, CLEAR_BATCH_FITS), [fits, *parameters, {}])
        self.size = sum(map(len, map(NEW_BODY_OF, messages)))
        self.adds = self.size + len(messages) * MESSAGE_OVERHEAD
        self._state = state
        self._messages = messages
        self._channel: str = first["channel"]
        self._now: float = first["now"]
        self._woken = 0

    def on_executed(self) -> None:
        ready = list(map(NEW_STATE_OF, self._added())).count(0)
        self._woken = self._state.wake(self._channel, ready, self._now, join=True)

    def on_commit(self) -> None:
        added = self._added()
        if added:
            self._state.messages_added(self._channel, added, self._now, self._woken)

    def _added(self) -> list[dict[str, Any]]:
        if not self._keyed:  # all or none
            return self._messages if self.rows()[1][0] else []
        outcome = zip(self._messages, self._outcome())
        return [message for message, result in outcome if result and not result.duplicate]

    def _outcome(self) -> list[Optional[PostResult]]:
        """The result of each message with keys; None if the batch does not fit."""
        results = self.rows()[1:-1]  # without those of CHECK_ and CLEAR_BATCH_FITS
        size = len(POST_KEYED)
        return [_post_result(results[i : i + size]) for i in range(0, len(results), size)]

    def result(self) -> list[int]:
        count = len(self._messages)
        if self._keyed:
            ids = [result.id for result in self._outcome() if result]
        else:
            _, (added, _), ((last,),), _ = self.rows()
            ids = list(range(last - count + 1, last + 1)) if added else []
        if len(ids) < count:
            raise Full(f"the batch does not fit below the high-level mark of {self._hlm}")
        return ids


def _post_result(results: list[Any]) -> Optional[PostResult]:
    """The result of POST_KEYED, or of its POST_MESSAGE alone; None if the channel is full."""
    if len(results) == 1:
        ((added, id),) = results
        return PostResult(id) if added else None
    known, messages, (added, id), _ = results
    if known:
        return PostResult(int(known[0][0]), duplicate=True)
    if messages:
        return PostResult(messages[0][0], duplicate=True)
    return PostResult(id) if added else None


class Publication(NamedTuple):
    """The result of one publication."""

    ids: dict[str, int]  # of the copies, by channel
    full: list[str]  # the channels left out since they are at their high-level mark
    duplicate: bool
    id: int = 0  # if it is kept


def copies_of(rows: Iterable[Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The copies in rows of PUBLISHED, as `State.messages_added` takes a message."""
    names = ("channel", "id", "state", "due_at", "expires_at")
    return (dict(zip(names, row)) for row in rows)


class Publish(Operation):
    """Adds copies of messages to each channel subscribed to a topic.

    The result is a `Publication` for each message.
    """

    is_bulk = True
    adds = MAX_BATCH_COPY_BYTES  # at most

    def __init__(self, state: State, messages: list[dict[str, Any]]) -> None:
        """`messages`: the parameters of PUBLISH_MESSAGE for each."""
        each: Sequence[str] = (FULL_SUBSCRIBERS, PUBLISH_MESSAGE, PUBLISHED)
        patterns = state.patterns.match_json(messages[0]["topic"])
        if patterns:
            each = (FULL_MATCHING, PUBLISH_MATCHING, PUBLISHED)
            messages = [{**message, "patterns": patterns} for message in messages]
        self._keeps = messages[0]["topic"] in state.retention
        if self._keeps:
            each = (KEEP_PUBLICATION, TRIM_PUBLICATIONS, *each)
            messages = [{**message, "trim": TRIM_ROWS} for message in messages]
        self._keyed = any(message["dedup"] is not None for message in messages)
        if self._keyed:
            each = (FIND_DEDUP, *each, SAVE_KEPT_DEDUP if self._keeps else SAVE_TOPIC_DEDUP)
        self._first = self._keyed + 2 * self._keeps  # the place of FULL_SUBSCRIBERS among `each`
        self._size = len(each)
        super().__init__(
            [statement for _ in messages for statement in each],
            [message for message in messages for _ in each],
        )
        self.size = sum(len(message["body"]) for message in messages)
        self._state = state
        self._messages = messages
        self._now: float = messages[0]["now"]
        self._woken: collections.Counter[str] = collections.Counter()

    def on_executed(self) -> None:
        self._woken.clear()
        if self._state.waiting.is_empty():
            return
        for copy in self._copies():
            if not copy["state"]:
                channel = copy["channel"]
                self._woken[channel] += self._state.wake(channel, 1, self._now, join=True)

    def on_commit(self) -> None:
        known = self.results[:: self._size] if self._keyed else ()
        publications = len(self.results) // self._size - sum(map(bool, known))
        self._state.counters["publications"] += publications
        live = self._state.live
        if live.patterns or self._messages[0]["topic"] in live.topics:
            self._report()
        for copy in self._copies():
            channel = copy["channel"]
            self._state.counters["publish"] += 1
            self._state.messages_added(channel, (copy,), self._now, self._woken[channel] > 0)
            self._woken[channel] -= not copy["state"]

    def _report(self) -> None:
        """Adds the events of those publications that are not duplicates."""
        names = ("topic", "body", "type", "headers")
        for n, message in enumerate(self._messages):
            results = self.results[n * self._size : (n + 1) * self._size]
            if not (self._keyed and results[0]):
                id = self._kept_id(results)
                self._state.live.published(id, *(message[name] for name in names))

    def _kept_id(self, results: Sequence[Any]) -> int:
        """The id of a publication, from its results; 0 if it is not kept."""
        added, id = results[self._keyed] if self._keeps else (0, 0)
        return id if added else 0

    def _copies(self) -> Iterator[dict[str, Any]]:
        for rows in self.results[self._first + 2 :: self._size]:
            yield from copies_of(rows)

    def result(self) -> list[Publication]:
        results = self.rows()
        publications = []
        for i in range(0, len(results), self._size):
            known = results[i] if self._keyed else []
            if known:
                lines = (line.partition(" ") for line in known[0][0].split("\n") if line)
                ids = {channel: int(id) for id, _, channel in lines}
                id = ids.pop("", 0)
                publications.append(Publication(ids, [], True, id))
            else:
                full, _, copies = results[i + self._first : i + self._first + 3]
                ids = {row[0]: row[1] for row in copies}
                id = self._kept_id(results[i : i + self._size])
                publications.append(Publication(ids, [channel for (channel,) in full], False, id))
        return publications


# -- consuming


class Deletion:
    """The part of an operation that deletes a message, with `lookup` and one statement more."""

    lookup: Sequence[str] = ()
    is_done = False  # after the commit: whether the message was deleted
    _channel = _group = ""
    _reason: Operation  # reads why it was not deleted

    def __init__(self, state: State, id: int, now: float) -> None:
        self._state = state
        self._id = id
        self._now = now
        flight = state.flights.find(id, now)
        if flight is None:
            self.lookup = (CHANNEL_OF_MESSAGE,)
        else:
            self._channel, self._group = flight.channel, flight.group

    def executed(self, operation: Operation) -> bool:
        """In the same transaction: reads the lease of a message that was not deleted, or unblocks
        the next one of its group; returns whether it was deleted."""
        if not operation.results[len(self.lookup)][0]:
            self._reason = Operation((LEASE_STATE,), operation.parameters)
            self._state.committer.join_transaction(self._reason)
            return False
        if self.lookup:
            _, self._channel, self._group = operation.results[0][0]
        if self._group:
            self._state.unblock_next(self._channel, self._now)
        return True

    def committed(self, operation: Operation) -> bool:
        """Counts the deletion; returns whether there was one."""
        self.is_done = operation.results[len(self.lookup)][0] > 0
        if self.is_done:
            self._state.messages_deleted(self._channel, (self._id,), self._now)
        return self.is_done

    def check(self, operation: Operation, otherwise: str = "") -> None:
        """Raises why the message was not deleted, if it was not; `otherwise` as for
        `refuse_lease`."""
        if not self.is_done:
            refuse_lease(operation, self._reason.rows()[0], "deleted", otherwise)


NEXT_TAKES = ((NEXT_MESSAGE, LEASE_NEXT), (NEXT_IF_DELETED, LEASE_IF_DELETED))

# For all but the usual takes; the second of each while a channel is limited, or may be.
BATCH_TAKES = tuple((pick, SELECT_BATCH, LEASE_BATCH) for pick in (PICK_BATCH, PICK_LIMITED))
AUTO_TAKES = tuple(
    (pick, SELECT_BATCH_ROWS, SELECT_BATCH, DELETE_BATCH) for pick in (PICK_BATCH, PICK_LIMITED)
)


class Take(Operation):
    """Takes messages for a consumer, which waits if there are none and it may.

    The result is the messages.  With `ack`, deletes that message first; if that cannot be done,
    takes nothing.  `woken_by` is the channel that woke the consumer.
    """

    owner: Consumer
    deletion: Optional[Deletion] = None  # of the message of `ack`
    _waits = False
    _declined: Optional[Unavailable] = None  # no memory for the messages, or no room to wait
    _woken_by = ""
    _pieces: Sequence[ProcessDue] = ()

    def __init__(
        self,
        state: State,
        consumer: Consumer,
        now: float,
        ack: Optional[int] = None,
        lease: Optional[int] = None,
        expected_channel: Optional[str] = None,
        woken_by: str = "",
        pieces: Sequence[ProcessDue] = (),
    ) -> None:
        """`pieces`: what was processed in vain since the try before this one."""
        names, n = consumer.channels, consumer.n
        channels, timers = state.channels, state.timers
        parameters = {
            "channel": names[0], "timeout": consumer.timeout or 0, "now": now, "acks": 0,
            "first_lease": state.committer.first_lease,
        }  # fmt: skip
        statements: tuple[str, ...] = NEXT_TAKES[ack is not None]
        is_due = timers.next_due <= now and any(timers.is_due(name, now) for name in names)
        is_limited = channels.is_shared or not channels.limited.isdisjoint(names)
        if is_limited or channels.pauses:
            statements = (NEXT_IF_OPEN, LEASE_IF_OPEN)
        if consumer.auto or n > 1 or len(names) > 1 or is_due:
            statements = (AUTO_TAKES if consumer.auto else BATCH_TAKES)[is_limited]
            parameters.update(channels="\n".join(names), n=n, max_bytes=MAX_BATCH_BYTES)
            parameters["n_expired"] = MAX_EXPIRED if is_due else 0
            self.is_bulk = n > 1
            self.size = min(n * TAKEN_BYTES, MAX_BATCH_BYTES) if n > 1 else 0
        if ack is not None:
            self.deletion = Deletion(state, ack, now)
            statements = (*self.deletion.lookup, DELETE_LEASED, *statements)
            parameters.update(id=ack, lease=lease, expected_channel=expected_channel, acks=1)
        super().__init__(statements, parameters)
        self.owner = consumer
        self._state, self._now = state, now
        self.durable = is_limited or consumer.auto or ack is not None
        if woken_by:
            self._woken_by, self._pieces = woken_by, pieces
            state.count_taking(woken_by, 1)

    def on_begin(self) -> None:
        consumer, parameters = self.owner, cast("dict[str, Any]", self.parameters)
        if consumer.memory is not None:
            room = consumer.memory.room() // (2 if consumer.auto else 1)
            parameters["max_bytes"] = min(MAX_BATCH_BYTES, max(room, 1))

    def on_executed(self) -> None:
        if self.deletion is not None:
            self.deletion.executed(self)
        rows, consumer = self.results[-2], self.owner
        self._declined = None
        if not rows:
            self._release_memory()
            return
        if not self.durable:
            self.durable = any(map(DELIVER_OF, rows))
        if consumer.auto:
            consumer.deleted_rows = self.results[-3]
            for _, channel in {(row[GROUP_COLUMN], row[1]) for row in rows if row[GROUP_COLUMN]}:
                self._state.unblock_next(channel, self._now)
        if consumer.memory is not None:
            try:
                consumer.memory.resize(self._size_of(rows))
            except Unavailable as error:
                self._decline(error)

    def on_dropped(self) -> None:
        """The consumer, which was woken for nothing, waits on: its place is still free."""
        self._release_memory()
        self._state.count_taking(self._woken_by, -1)
        if not self._state.waiting.add(self.owner):
            self._state.committer.submit(EndWait(self.owner))

    def _release_memory(self) -> None:
        """Gives back what was reserved in a try that failed."""
        if self.owner.memory is not None:
            self.owner.memory.release()

    def _size_of(self, rows: Sequence[Sequence[Any]]) -> int:
        """Bytes of the messages taken; with `auto` each is there twice."""
        size: int = len(rows[0][BODY_COLUMN])
        if len(rows) > 1:
            size = sum(map(len, map(BODY_OF, rows))) + len(rows) * MESSAGE_BYTES
        return 2 * size if self.owner.auto else size

    def _decline(self, error: Unavailable) -> None:
        """Puts the messages back in the same transaction, as if they had not been taken."""
        if self._state.committer.runs_alone:
            raise error  # which undoes the take, while another transaction might fail
        self._declined = error
        rows = self.results[-2]
        undo = UndoTake(self._state, self.owner, list(map(TAKEN_OF, rows)), self._now)
        self._state.committer.join_transaction(undo)
        self.results[-2] = [  # without bodies: many may be declined in one transaction
            (*row[:BODY_COLUMN], b"", *row[BODY_COLUMN + 1 :]) for row in rows
        ]

    def on_commit(self) -> None:
        state, consumer, now = self._state, self.owner, self._now
        counters = state.counters
        rows = self.results[-2]  # in each kind of take
        if not self._woken_by:
            counters["msg-get"] += 1
        if self.deletion is not None:
            consumer.acknowledged = self.deletion.committed(self)
            if not consumer.acknowledged:
                return
        if not rows:
            try:
                self._waits = state.waiting.add(consumer) or self._try_again()
            except Unavailable as error:
                self._declined = error
            return
        count, channel = len(rows), rows[0][1]
        state.events[channel]["delivered"] += count
        if consumer.auto:
            counters["msg-delete"] += count
            state.events[channel]["deleted"] += count
        else:
            counters["msg-hide"] += count
            state.timers.schedule(channel, now + min(map(TIMEOUT_OF, rows)))
        flights, holder = state.flights.latest(), consumer.holder
        for row in rows:
            state.queue_times.observe(abs(now - row[-1]))  # it may be posted a moment after now
            if not consumer.auto:
                flight = (channel, now, now + row[3], row[9], holder, row[GROUP_COLUMN])
                flights[row[0]] = tuple.__new__(Flight, flight)  # twice as fast as Flight()
        if state.live.channels:
            state.live.delivered(list(map(message_of, rows)), deleted=consumer.auto)
        self.is_large = count > LARGE_COUNT
        if self._woken_by and (
            self._woken_by != channel or (consumer.auto and channel in state.channels.limited)
        ):
            self._wake_next()  # what woke this consumer is left: the message, or room in flight

    def _try_again(self) -> bool:
        """Submits another take if more is due in the channels than could be processed."""
        state, channels = self._state, self.owner.channels
        backlogs = [channel for channel in channels if channel in state.backlogs]
        if not backlogs or state.timers.is_stopping() or any(p.error for p in self._pieces):
            return False
        pieces = [state.process_due(channel, self._now) for channel in backlogs]
        woken_by = self._woken_by or channels[0]  # it is counted already
        take = Take(state, self.owner, self._now, woken_by=woken_by, pieces=pieces)
        state.committer.submit(take)
        return True

    def on_done(self) -> None:
        if self._woken_by:
            self._state.count_taking(self._woken_by, -1)
            if self.error is not None:
                self._wake_next()  # so that all consumers learn of it
        if not self._waits:
            self.owner.on_done(self)

    def _wake_next(self) -> None:
        self._state.wake(self._woken_by, 1, self._now)

    def result(self) -> list[Message]:
        error = self.error or self._declined
        if error is not None:
            if self.owner.acknowledged and isinstance(error, (Unavailable, Full)):
                return []  # since the other message has been deleted, perhaps before the wait
            raise error
        if self.deletion is not None:
            self.deletion.check(self)
        messages = list(map(message_of, self.results[-2]))
        if len(messages) > 1:
            messages.sort(key=PRIORITY_OF)  # the rows are sorted by id
        return messages


class EndWait(Operation):
    """Ends the wait of a consumer without a message: the result is empty, or raises the reason."""

    def __init__(self, consumer: Consumer, reason: Optional[BaseException] = None) -> None:
        super().__init__()
        self.owner = consumer
        self._reason = reason

    def on_done(self) -> None:
        self.owner.on_done(self)

    def result(self) -> list[Message]:
        if self._reason is not None:
            raise self._reason
        return []


class UndoTake(Operation):
    """Puts back messages that could not be handed over; those deliveries are not counted."""

    is_bulk = True

    def __init__(
        self, state: State, consumer: Consumer, taken: Sequence[Taken], now: float
    ) -> None:
        """`taken`: all of one channel."""
        restored: list[dict[str, Any]] = []  # those of groups
        if consumer.auto:
            statement = RESTORE_MESSAGE
            names = re.findall(r"\w+", RESTORED_COLUMNS)
            rows = [dict(zip(names, row), now=now) for row in consumer.deleted_rows]
            restored = [row for row in rows if row["group_key"]]
        else:
            statement = UNDO_TAKE
            rows = [{"id": id, "lease": lease, "now": now} for id, _, lease in taken]
        super().__init__(
            (*[statement] * len(rows), BLOCK_LATER, EXPIRE_MESSAGE, *BURY_DEAD),
            [*rows, restored, rows, *[{"now": now}] * len(BURY_DEAD)],
        )
        self._state = state
        self._auto = consumer.auto
        self._ids = [id for id, _, _ in taken]
        self._channel = taken[0][1]
        self._now = now

    def on_commit(self) -> None:
        counters, events = self._state.counters, self._state.events
        *undone, _, (expired, _), dead, moved, deleted = self.results
        count = sum(changed for changed, _ in undone)
        for event in ("delivered", "deleted")[: 1 + self._auto]:
            events[self._channel][event] -= count
        events[self._channel]["expired"] += expired
        for id in self._ids:
            self._state.flights.pop(id)
        counters["msg-delete" if self._auto else "msg-hide"] -= count
        counters["msg-retention"] += expired
        self._state.dead_buried(self._channel, (dead, moved, deleted), self._now)
        self._state.timers.schedule(self._channel, self._now)  # their lingering may end
        self._state.wake(self._channel, count, self._now)


# -- acknowledging


class Delete(Operation):
    """Deletes a message."""

    def __init__(
        self,
        state: State,
        id: int,
        lease: Optional[int],
        expected_channel: Optional[str],
        now: float,
    ) -> None:
        statement = DELETE_LEASED
        if lease is None and expected_channel is None:
            statement = DELETE_MESSAGE
        self._deletion = Deletion(state, id, now)
        super().__init__(
            (*self._deletion.lookup, statement),
            {"id": id, "lease": lease, "expected_channel": expected_channel},
        )

    def on_executed(self) -> None:
        self._deletion.executed(self)

    def on_commit(self) -> None:
        self._deletion.committed(self)

    def result(self) -> None:
        self.rows()
        self._deletion.check(self)


class DeleteBatch(Operation):
    """Deletes messages; the result is the ids deleted, in conflict, and missing."""

    def __init__(
        self,
        state: State,
        messages: Mapping[int, Optional[int]],
        expected_channel: Mapping[int, Optional[str]],
        now: float,
    ) -> None:
        """`messages`: the leases by id; `expected_channel`: of those that must be in one."""
        wanted: dict[int, object] = {**messages}
        for id, channel in expected_channel.items():
            if channel is not None and id in messages:
                wanted[id] = (messages[id], channel)
        parameters = {"messages": json.dumps(wanted), "n": len(messages)}
        super().__init__((FIND_WANTED, DELETE_WANTED), parameters)
        self._state = state
        self._ids = list(messages)
        self._now = now

    def on_executed(self) -> None:
        for channel, _ in {row[1:3] for row in self.results[0] if row[2] and row[3]}:
            self._state.unblock_next(channel, self._now)

    def on_commit(self) -> None:
        deleted: dict[str, list[int]] = {}
        for id, channel, _, is_deleted in self.results[0]:
            if is_deleted:
                deleted.setdefault(channel, []).append(id)
        for channel, ids in deleted.items():
            self._state.messages_deleted(channel, ids, self._now)

    def result(self) -> tuple[list[int], list[int], list[int]]:
        rows = self.rows()[0]
        found = {row[0]: row[3] for row in rows}
        return (
            [id for id, is_deleted in found.items() if is_deleted],
            [id for id, is_deleted in found.items() if not is_deleted],
            [id for id in self._ids if id not in found],
        )


def refuse_lease(
    operation: Operation, lease_state: Sequence[Sequence[Any]], done: str, otherwise: str = ""
) -> NoReturn:
    """Raises why a message could not be `done` with, from its row of LEASE_STATE, if any.

    `otherwise`: the reason if there is such a message and its lease was not overtaken; without
    it, that the message is not in flight.
    """
    parameters: Any = operation.parameters
    id, lease = parameters["id"], parameters["lease"]
    if not lease_state:
        raise NotFound(f"there is no message {id}")
    if lease is not None and lease_state[0][0] != lease:
        raise Conflict(f"lease {lease} of message {id} has been overtaken: it was delivered again")
    raise Conflict(
        otherwise or f"message {id} is not in flight: only what was delivered can be {done}"
    )


# -- timers

PROCESS_DUE = (
    DELETE_EXPIRED,
    EXPIRE_WAITING,
    EXPIRE_TIMED_OUT,
    EXHAUST_TIMED_OUT,
    *BURY_DEAD,
    BACK_OFF_TIMED_OUT,
    COUNT_DUE,
    MAKE_DUE_READY,
    NEXT_DUE,
    NEXT_EXPIRY,
)


class ProcessDue(Operation):
    """A piece of what is due in a channel: returns timed-out and delayed messages to ready,
    removes expired ones, and wakes the consumers waiting for them."""

    is_bulk = True
    statements: Sequence[str] = PROCESS_DUE

    def __init__(self, state: State, channel: str, now: float, n: int) -> None:
        super().__init__(self.statements, {"channel": channel, "now": now, "n": n})
        self.now = now
        self._state = state
        self._channel = channel

    def on_commit(self) -> None:
        state, channel = self._state, self._channel
        (
            (deleted, _), (expired, _), (expired_in_flight, _), (exhausted, _), *buried,
            (delayed, _), ((ready, timed_out),), _, ((next_due,),), ((next_expiry,),),
        ) = self.results  # fmt: skip
        timeouts = expired_in_flight + exhausted + delayed + timed_out
        expired += deleted + expired_in_flight
        state.counters["msg-timeouts"] += timeouts
        state.counters["msg-retention"] += expired
        state.counters["msg-delete"] += deleted
        state.events[channel]["timed_out"] += timeouts
        state.events[channel]["expired"] += expired
        self.set_next([moment for moment in (next_due, next_expiry) if moment is not None])
        state.dead_buried(channel, buried, self.now)
        if ready:
            state.messages_ready(channel, ready, self.now)
        state.flights_ended(channel, timeouts - timed_out, self.now)

    def set_next(self, moments: Sequence[float]) -> None:
        """Schedules the next piece for the earliest of some moments.

        Consumers may wait although there is a message: behind expired ones, of which a take
        passes over only so many.  One of them tries again after each piece, all after the last.
        """
        state, channel, next_due = self._state, self._channel, min(moments, default=NEVER)
        state.timers.set_next(channel, next_due)
        if next_due <= self.now:
            state.backlogs.add(channel)
            state.wake(channel, 1, self.now)
        elif channel in state.backlogs:
            state.backlogs.discard(channel)
            state.wake(channel, state.waiting.count(channel), self.now)
        state.due_piece.adapt(self.seconds, next_due <= self.now)

    def on_done(self) -> None:
        if self._state.processing.get(self._channel) is self:
            del self._state.processing[self._channel]
        if self.error is not None:
            self._state.timers.schedule(self._channel, self.now)
        super().on_done()


class EndPausesAndKeys(ProcessDue):
    """A piece of what is due under `ALL`: ends pauses, and deletes old dedup keys and replies."""

    statements = (ENDED_PAUSES, END_PAUSES, DELETE_OLD_DEDUPS, DELETE_OLD_REPLIES, NEXT_PAUSE)

    def on_commit(self) -> None:
        state = self._state
        pauses, _, (keys, _), (replies, _), ((next_pause,),) = self.results
        parameters: Any = self.parameters
        moments = [self.now] if max(keys, replies) == parameters["n"] else []
        self.set_next(moments if next_pause is None else [*moments, next_pause])
        for channel, count in pauses:
            state.channels.pauses.pop(channel, None)
            state.wake(channel, count, self.now)


# ---------------------------------------------------------------------------------------------
# Changes: the other operations on messages.  They keep or end a flight, change or move what waits,
# and drain a channel.
# ---------------------------------------------------------------------------------------------

# -- in flight


class Touch(Operation):
    """Restarts the visibility timeout of a message in flight."""

    def __init__(self, state: State, parameters: dict[str, Any]) -> None:
        super().__init__((LEASE_STATE, TOUCH_MESSAGE, DUE_TIMES), parameters)
        self._state = state
        self._id: int = parameters["id"]

    def on_commit(self) -> None:
        _, (changed, _), due_times = self.results
        if changed:
            ((channel, _, due_at, _),) = due_times
            self._state.counters["msg-touch"] += 1
            self._state.flights.touch(self._id, due_at)
            self._state.timers.schedule(channel, due_at)

    def result(self) -> None:
        lease_state, (changed, _), _ = self.rows()
        if not changed:
            refuse_lease(self, lease_state, "touched")


class Release(Operation):
    """Gives a message in flight back; if that was its last delivery, it is a dead letter.

    If it is `uncounted`, that cannot be: it is as if it had not been delivered, and it is ready
    now or after `delay`.
    """

    def __init__(self, state: State, parameters: dict[str, Any], uncounted: bool = False) -> None:
        if uncounted and parameters["lease"] is None:
            raise BadRequest("an uncounted release needs the lease of the delivery")
        release = RELEASE_UNCOUNTED if uncounted else RELEASE_MESSAGE
        super().__init__(
            (LEASE_STATE, release, EXHAUST_RELEASED, EXPIRE_MESSAGE, *BURY_DEAD, DUE_TIMES),
            parameters,
        )
        self._state = state
        self._id: int = parameters["id"]
        self._now: float = parameters["now"]

    def on_executed(self) -> None:
        _unblock_group(self._state, self.results[0], self._now)

    def on_commit(self) -> None:
        state = self._state
        lease_state, (changed, _), (exhausted, _), (expired, _), *buried, due_times = self.results
        if not changed + exhausted:
            return
        ((_, _, channel, _),) = lease_state
        state.flights.pop(self._id)
        state.counters["msg-release"] += 1
        state.events[channel]["released"] += 1
        state.counters["msg-retention"] += expired
        state.events[channel]["expired"] += expired
        state.dead_buried(channel, buried, self._now)
        state.flights_ended(channel, 1, self._now)
        for channel, delayed, due_at, expires_at in due_times if changed else ():
            state.timers.schedule(channel, expires_at or due_at)
            if delayed:
                state.timers.schedule(channel, due_at)
            else:
                state.wake(channel, 1, self._now)

    def result(self) -> None:
        lease_state, (changed, _), (exhausted, _), *_ = self.rows()
        if not (changed or exhausted):
            refuse_lease(self, lease_state, "released")


class Reject(Operation):
    """Moves a message to its dead channel, or deletes it."""

    def __init__(self, state: State, parameters: dict[str, Any]) -> None:
        super().__init__((LEASE_STATE, REJECT_MESSAGE, *BURY_DEAD), parameters)
        self._state = state
        self._id: int = parameters["id"]
        self._now: float = parameters["now"]

    def on_executed(self) -> None:
        _unblock_group(self._state, self.results[0], self._now)

    def on_commit(self) -> None:
        lease_state, (changed, _), *buried = self.results
        if changed:
            ((_, _, channel, _),) = lease_state
            self._state.flights.pop(self._id)
            self._state.counters["msg-reject"] += 1
            self._state.events[channel]["rejected"] += 1
            self._state.dead_buried(channel, buried, self._now)
            self._state.flights_ended(channel, 1, self._now)

    def result(self) -> None:
        lease_state, (changed, _), *_ = self.rows()
        if not changed:
            refuse_lease(self, lease_state, "rejected")


def _unblock_group(state: State, lease_state: Sequence[Sequence[Any]], now: float) -> None:
    """Unblocks the next message of a group, from the LEASE_STATE of one that may have left it."""
    for _, _, channel, group in lease_state:
        if group:
            state.unblock_next(channel, now)


# -- waiting


class ChangeMessage(Operation):
    """Changes a message that waits: ready, or delayed."""

    def __init__(self, state: State, parameters: dict[str, Any]) -> None:
        super().__init__((WAITING_MESSAGE, CHANGE_MESSAGE), parameters)
        self._state = state
        self._values = parameters

    def on_commit(self) -> None:
        before, (changed, _) = self.results
        now, delay = self._values["now"], self._values["delay"]
        if changed and delay is not None:
            channel, was_hidden, _, _, blocked = before[0]
            if delay:
                self._state.timers.schedule(channel, now + delay)
            elif was_hidden and not blocked:
                self._state.messages_ready(channel, 1, now)

    def result(self) -> None:
        before, (changed, _) = self.rows()
        if not changed:
            deliver = self._values["deliver"]
            check_waits(self._values["id"], before)
            if deliver and deliver <= before[0][2]:
                raise Conflict(
                    f"the message was delivered {before[0][2]} times: deliver must be more, or 0"
                )
            raise Conflict("the message would expire before it is ready: delay must be shorter")


class RedriveMessage(Operation):
    """Moves one message back to the channel that it came from, or to another."""

    def __init__(self, state: State, parameters: dict[str, Any]) -> None:
        super().__init__((WAITING_MESSAGE, REDRIVE_MESSAGE), parameters)
        self._state = state
        self._values = parameters

    def on_commit(self) -> None:
        before, (moved, _) = self.results
        if moved:
            channel, _, _, dead_from, _ = before[0]
            target, now = self._values["to"] or dead_from, self._values["now"]
            self._state.counters["msg-redrive"] += 1
            self._state.events[channel]["redriven"] += 1
            self._state.timers.schedule(channel, now)  # the next of its group
            self._state.messages_ready(target, 1, now)
            self._state.timers.schedule(target, now)  # its lingering may end

    def result(self) -> None:
        before, (moved, _) = self.rows()
        if not moved:
            check_waits(self._values["id"], before)
            raise Conflict("the message is no dead letter, or is in that channel already")


def check_waits(id: int, before: Sequence[Any]) -> None:
    """Raises `NotFound` or `Conflict` for a message that does not wait, from WAITING_MESSAGE."""
    if not before:
        raise NotFound(f"there is no message {id}")
    if before[0][1] == STATES.index("hidden"):
        raise Conflict(f"message {id} is in flight: only one that waits can be changed or moved")


# -- in pieces


class Redrive(Operation):
    """A piece of a redrive: moves ready messages to where they came from, or all to one channel.

    The result is the number of messages.  The next piece begins `after` the last message that
    this one looked at.
    """

    is_bulk = True

    def __init__(self, state: State, parameters: dict[str, Any]) -> None:
        super().__init__((REDRIVE_PIECE, REDRIVE_COUNTS, REDRIVE_MESSAGES), parameters)
        self.after: Optional[tuple[int, int]] = None  # priority and id; None: there is no more
        self._state = state
        self._channel: str = parameters["channel"]
        self._now: float = parameters["now"]
        self._n: int = parameters["n"]

    def on_commit(self) -> None:
        if self.results[1]:
            self._state.timers.schedule(self._channel, self._now)  # others of their groups
        for target, count in self.results[1]:
            self._state.counters["msg-redrive"] += count
            self._state.events[self._channel]["redriven"] += count
            self._state.messages_ready(target, count, self._now)
            self._state.timers.schedule(target, self._now)  # the lingering of some may end

    def result(self) -> int:
        piece, _, (moved, _) = self.rows()
        self.after = piece[-1] if len(piece) == self._n else None
        return int(moved)


class Drain(Operation):
    """A piece of a drain: deletes messages of a channel, and dedup keys.

    The result is the number of messages.
    """

    is_bulk = True

    def __init__(self, state: State, parameters: dict[str, Any]) -> None:
        super().__init__((DRAIN_READY, DRAIN_HIDDEN, DELETE_DEDUPS), parameters)
        self.is_last = False
        self._state = state
        self._channel: str = parameters["channel"]
        self._n: int = parameters["n"]
        self._now: float = parameters["now"]

    def on_commit(self) -> None:
        self._state.events[self._channel]["deleted"] += self.result()
        self._state.flights_ended(self._channel, self.results[1][0], self._now)
        self.is_last = all(deleted < self._n for deleted, _ in self.results)
        self._state.counters["channel-drain"] += self.is_last
        self._state.timers.schedule(self._channel, self._now)  # what was blocked by others

    def result(self) -> int:
        (ready, _), (hidden, _), _ = self.rows()
        return int(ready + hidden)


# ---------------------------------------------------------------------------------------------
# Management: the calls that neither produce nor consume.  They set up channels and topics, do bulk
# work in pieces, and read what there is.
# ---------------------------------------------------------------------------------------------

TOPIC_IS_FULL = "the topic has {} subscriptions, and no more can be made"
DEAD_ORDERS = ("newest", "oldest")  # of dead letters: which come first
ChannelRow = tuple[str, int, Optional[float]]  # name, ready messages, when the oldest was posted
CHANNEL_ORDERS: Mapping[str, Callable[[ChannelRow], Any]] = {
    "name": lambda row: row[0],
    "ready": lambda row: (-row[1], row[0]),  # the most first
    "oldest": lambda row: (NEVER if row[2] is None else row[2], row[0]),  # the oldest first
}


# ready, in flight, delayed, blocked, age of the oldest ready one, consumers that wait
ChannelMetrics = list[float]


class ChannelList:
    """The channels with messages, subscriptions, or consumers that wait or did so lately.

    Reads some at a time, so that other calls find room between them.
    """

    def __init__(self, read: Callable[..., list[list[Any]]], waiting: Iterable[str]) -> None:
        self._read = read
        self._waiting = sorted(waiting)

    def names(
        self, n: Optional[int], after: str, order: str, is_wanted: Callable[[str], bool]
    ) -> list[str]:
        """Up to `n` wanted names, those after the channel `after`, in one of CHANNEL_ORDERS.

        By name this costs as much as it passes over; else it looks at all channels.
        """
        rank = CHANNEL_ORDERS[order]
        rows = (row for row in self._rows(after, order) if is_wanted(row[0]))
        if order == "name":
            return [name for name, *_ in itertools.islice(rows, n)]
        if after:
            counts, ((oldest,),) = self._read(CHANNEL_COUNTS, OLDEST_READY, channel=after)
            last = rank((after, counts[0][0] if counts else 0, oldest))
            rows = (row for row in rows if rank(row) > last)
        first = sorted(rows, key=rank) if n is None else heapq.nsmallest(n, rows, key=rank)
        return [name for name, *_ in first]

    def _rows(self, after: str, order: str) -> Iterator[ChannelRow]:
        """The rows of all channels, sorted by name; in the order of names those after `after`."""
        after = after if order == "name" else ""
        by_age = order == "oldest"
        waiting = self._waiting[bisect.bisect_right(self._waiting, after) :]
        rows: Iterator[ChannelRow] = heapq.merge(
            self.counted(after, by_age),
            ((name, 0, None) for (name,) in self._pages(SUBSCRIBED_AFTER, after)),
            ((name, 0, None) for name in waiting),
            key=lambda row: row[0],
        )
        for _, same in itertools.groupby(rows, key=lambda row: row[0]):
            yield next(same)  # that of CHANNELS_AFTER, if there is one

    def counted(self, after: str = "", by_age: bool = True) -> Iterator[Any]:
        """The rows of CHANNELS_AFTER."""
        return self._pages(CHANNELS_AFTER, after, by_age=by_age)

    def _pages(self, statement: str, after: str, **parameters: object) -> Iterator[Any]:
        while True:
            (rows,) = self._read(statement, after=after, n=CHANNEL_PAGE, **parameters)
            yield from rows
            if len(rows) < CHANNEL_PAGE:
                return
            after = rows[-1][0]


class BulkCall:
    """A call that touches many rows: it runs a piece at a time, and the pieces of all such calls
    at the same time are together as large as that of one.  Used by one thread."""

    def __init__(self, committer: Committer, calls: set[BulkCall], done: str) -> None:
        """`calls`: those at this time; `done`: what it does with messages."""
        self.total = 0  # messages done
        self._committer = committer
        self._calls = calls
        self._done = done
        self._size = PieceSize(FIRST_PIECE)

    def __enter__(self) -> BulkCall:
        self._calls.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.discard(self)

    def rows(self) -> int:
        """How many rows the next piece may touch."""
        return max(self._size.rows // len(self._calls), 1)

    def run(self, piece: Operation) -> int:
        """Runs a piece; returns how many messages it has done.

        The error of a later piece says that something was changed before.
        """
        try:
            count: int = self._committer.run(piece)
        except LingerError as error:
            if not self.total:
                raise
            reason = str(error).replace(NOTHING_CHANGED, "")
            raise type(error)(
                f"only {self.total} messages were {self._done}; repeat the call for the others:"
                f" {reason}"
            ) from error
        self.total += count
        self._size.adapt(piece.seconds, is_full=True)
        return count


class HealthCheck:
    """Whether the database can be written to: what a write found at most HEALTH_INTERVAL ago."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._lock = threading.RLock()  # guards the two below, and is held while writing
        self._written_at = -NEVER  # when the last write began
        self._error: Optional[LingerError] = None

    @locked
    def check(self) -> None:
        """Raises the error of the last write, if it had one."""
        now = self._state.clock.source.monotonic()
        if not 0 <= now - self._written_at < HEALTH_INTERVAL:
            self._written_at, self._error = now, None
            parameters = {"key": "health", "value": str(self._state.clock.now())}
            try:
                self._state.committer.run(Operation((SET_CONFIG,), parameters))
            except LingerError as error:
                self._error = error
        if self._error is not None:
            raise type(self._error)(str(self._error))


class Statistics:
    """What is measured: totals, their history, and the figures of each channel."""

    def __init__(self, store: Transactions, state: State) -> None:
        self._store = store
        self._state = state
        self._history = History(state.clock.now())

    def message_totals(self) -> list[int]:
        """The sums of all channels, a page at a time, so that other reads find room."""
        totals, after, count = [0] * 5, "", CHANNEL_PAGE
        while count == CHANNEL_PAGE:
            (((*sums, count, after),),) = self._store.read(
                MESSAGE_TOTALS, after=after, n=CHANNEL_PAGE
            )
            totals = [total + part for total, part in zip(totals, sums)]
        return totals

    def sample(self) -> None:
        """Counts what histograms have noted, and adds a point to the history, if it is due."""
        for histogram in self.histograms().values():
            histogram.fold()
        now = self._state.clock.now()
        if not self._history.is_due(now):
            return
        ready, in_flight, *_ = self.message_totals()
        counts = self._state.events.by_channel().values()
        totals = {event: sum(count[event] for count in counts) for event in EVENTS}
        totals["failed"] = sum(totals[event] for event in FAILURES)
        totals["published"] = self._state.counters["publications"]
        self._history.add(now, [totals[name] for name in SAMPLED[:-2]], ready, in_flight)

    def channels(self) -> dict[str, ChannelMetrics]:
        """Each channel with counters of its own; under "" all others together."""
        now, events = self._state.clock.now(), self._state.events
        found: dict[str, ChannelMetrics] = {name: [0] * 6 for name in events.by_channel()}
        for name, ready, oldest, *hidden in ChannelList(self._store.read, ()).counted():
            row = found.setdefault(events.label(name), [0] * 6)
            age = 0 if oldest is None else now - oldest
            counts = (ready, *hidden)
            row[:] = [*map(operator.add, row, counts), max(row[4], round(age, 3)), 0]
        for name, count in self._state.waiting.counts().items():
            found.setdefault(events.label(name), [0] * 6)[5] += count
        return found

    def events(self) -> dict[str, dict[str, int]]:
        """How often each of EVENTS has happened in each of the same channels."""
        return self._state.events.by_channel()

    def histograms(self) -> dict[str, Histogram]:
        """What is measured since the start, by its name in METRICS."""
        return {
            "linger_commit_seconds": self._state.committer.commit_times,
            "linger_commit_operations": self._state.committer.commit_sizes,
            "linger_queue_time_seconds": self._state.queue_times,
            "linger_flight_time_seconds": self._state.flight_times,
        }

    def disk_usage(self) -> dict[str, int]:
        """The bytes of the database and its log, and those that are free, by name in METRICS."""
        return self._store.disk_usage()

    def schedules_and_kept(self) -> tuple[int, int, dict[str, int]]:
        """How many schedules there are, and how many with an error, and the number of publications
        of each topic that keeps any."""
        ((schedules, failed),), kept = self._store.read(SCHEDULE_COUNTS, KEPT_COUNTS)
        return schedules, failed, dict(kept)

    def history(self, seconds: int = HISTORY_SECONDS) -> dict[str, Any]:
        """The totals of the last seconds: `time`, when each point was added in Unix time, and for
        each of SAMPLED its values, what has happened since the point before."""
        now, wall = self._state.clock.now(), self._state.clock.source.time()
        points = self._history.since(now - seconds)
        columns = zip(*(values for _, values in points)) if points else [()] * len(SAMPLED)
        times = [round(wall - (now - moment), 1) for moment, _ in points]
        return {"interval": SAMPLE_INTERVAL, "time": times, **dict(zip(SAMPLED, columns))}


def listed_message(flights: Flights, row: tuple[Any, ...]) -> tuple[Message, str]:
    """The message in a row of a listing, and its state."""
    message, state = message_of(row), STATES[row[-1]]
    if state == "hidden":
        message = message._replace(holder=flights.holder_of(message.id, message.lease))
    return message, state


class Administration:
    """The calls that neither produce nor consume: they set up channels and topics, and read.

    What they read is as of the last commit.
    """

    def __init__(self, store: Transactions, state: State, max_message: int) -> None:
        self.max_message = max_message
        self._store = store
        self._state = state
        self._committer = state.committer
        self._read = state.committer.read
        self._bulk_calls: set[BulkCall] = set()
        self._started = state.clock.now()
        self.start = int(state.clock.source.time())  # Unix time, to be shown
        self.statistics = Statistics(store, state)
        self._health = HealthCheck(state)
        ((row,),) = store.read(GET_CONFIG, key="server_id")
        self.id: str = row[0]

    @property
    def counters(self) -> dict[str, int]:
        """Each of COUNTERS since the start."""
        sums = {name: self._state.events.total(event) for name, event in SUMS.items()}
        return {**self._state.counters, **sums}

    def now(self) -> float:
        """Broker time, in seconds."""
        return self._state.clock.now()

    def process_due(self, seconds: float = NEVER) -> None:
        """Returns timed-out and delayed messages to ready, removes expired ones, and wakes the
        consumers waiting for them; in pieces, with room for other calls between them.

        Begins no further piece after so many seconds.
        """
        state, end = self._state, time.perf_counter() + seconds
        state.timers.schedule(ALL, self.now())  # old keys are not scheduled
        while state.timers.next_due <= (now := self.now()):
            channels = state.timers.due_channels(now)
            pieces = [state.process_due(channel, now) for channel in channels]
            self._committer.run(Operation())
            for piece in pieces:  # of which another thread may be about to submit one
                if piece.error is not None:
                    raise piece.error
            if state.timers.is_stopping() or time.perf_counter() > end:
                break

    def _submit_due(self, *channels: str) -> None:
        """Submits what is due, before an operation on channels, if anything is."""
        now = self.now()
        if self._state.timers.next_due <= now:
            self._submit_pieces(channels, now)

    def _submit_pieces(self, channels: Collection[str], now: float) -> None:
        """Submits a piece of what is due in channels, and in others whose dead letters they may
        get.

        A backlog in another channel is left to the ticker.
        """
        state = self._state
        for name in channels:
            if state.timers.is_due(name, now):
                state.process_due(name, now)
        for name in state.timers.due_channels(now):
            if name not in channels and name not in state.backlogs:
                state.process_due(name, now)

    def _run(self, operation: Operation, *channels: str) -> Any:
        self._submit_due(*channels)
        return self._committer.run(operation)

    # -- channels and topics

    def drain(self, channel: str) -> None:
        """Deletes all messages of a channel, whatever their state, and its dedup keys.

        In pieces: those that are there now, and not those that are posted meanwhile.
        """
        scope = f"channel {check_name('channel', channel)}"
        self._submit_due(channel)
        newest, counts = self._read(NEWEST_MESSAGE, CHANNEL_COUNTS, channel=channel)
        left = sum(counts[0][:3]) if counts else 0
        parameters: dict[str, Any] = {"channel": channel, "scope": scope, "now": self.now()}
        parameters["batch_scope"] = f"batch {scope}"
        parameters["newest"] = parameters["newest_key"] = newest[0][0] or 0
        with BulkCall(self._committer, self._bulk_calls, "deleted") as call:
            while True:
                n = max(call.rows() // 2, 1)  # up to n ready messages, and n others
                piece = Drain(self._state, {**parameters, "n": n})
                left -= call.run(piece)
                if piece.is_last:
                    return
                if left <= 0:  # what is there now has come by a move: only keys are left
                    parameters["newest"] = 0

    def redrive(self, channel: str, n: Optional[int] = None, to: Optional[str] = None) -> int:
        """Moves up to `n` (None: all) ready messages of a dead channel, in order, to where they
        came from, or all to the channel `to`; returns how many.

        In pieces: those that are ready now, and not those that become so meanwhile.
        """
        if to is not None and check_name("channel", to) == channel:
            raise BadRequest("to must be another channel than the one that is emptied")
        if to is not None:
            self._state.channels.reserve(to)
        self._submit_due(check_name("channel", channel))
        newest = self._read(NEWEST_MESSAGE)[0][0][0] or 0
        parameters = {"channel": channel, "to": to, "newest": newest, "now": self.now()}
        after: Optional[tuple[int, int]] = (MIN_INTEGER, 0)
        with BulkCall(self._committer, self._bulk_calls, "moved") as call:
            while after is not None and (n is None or call.total < n):
                rows = call.rows() if n is None else min(call.rows(), n - call.total)
                place = {"after_priority": after[0], "after_id": after[1], "n": rows}
                piece = Redrive(self._state, {**parameters, **place})
                call.run(piece)
                after = piece.after
            return call.total

    def subscribe(self, channel: str, topic: str, **parameters: Unpack[MessageFields]) -> None:
        """Subscribes a channel to a topic: copies get `parameters`; replaces a subscription."""
        values = subscription_values(self._state, channel, parameters)
        values.update(topic=check_name("topic", topic), max_subscribers=MAX_SUBSCRIBERS)
        self._store.check_space()
        self._state.channels.reserve(channel)
        ((changed, _),) = self._run(
            Change((SUBSCRIBE,), values, lambda r: self._count("subscription-add", r[0][0]))
        )
        if not changed:
            raise Full(TOPIC_IS_FULL.format(MAX_SUBSCRIBERS))

    def unsubscribe(self, channel: str, topic: str) -> None:
        """Ends a subscription; it is no error if there is none."""
        names = {"channel": check_name("channel", channel), "topic": check_name("topic", topic)}
        self._run(
            Change((UNSUBSCRIBE,), names, lambda r: self._count("subscription-delete", r[0][0]))
        )

    def _count(self, counter: str, count: int) -> None:
        self._state.counters[counter] += count

    def set_settings(self, channel: str, **parameters: Unpack[ChannelFields]) -> None:
        """Sets what holds for messages posted to a channel that do not say otherwise, and its
        own `hlm`; replaces earlier settings."""
        settings = _parse_settings(parameters)
        self._state.channels.reserve(check_name("channel", channel))
        self._write_settings(SET_SETTINGS, channel, settings)

    def change_settings(self, channel: str, **parameters: Unpack[ChannelFields]) -> None:
        """Sets some of them, and leaves the others as they are."""
        settings = _parse_settings(parameters)
        validate_linger({**self.settings(channel), **settings})
        self._state.channels.reserve(channel)
        self._write_settings(CHANGE_SETTINGS, channel, settings)

    def clear_settings(self, channel: str) -> None:
        """Clears the settings of a channel; it is no error if there are none."""
        self._write_settings(CLEAR_SETTINGS, check_name("channel", channel), {})

    def _write_settings(self, statement: str, channel: str, settings: Mapping[str, Any]) -> None:
        """Runs a statement that changes the settings of a channel, and learns the result."""
        now = self.now()

        def effect(results: list[Any]) -> None:
            _, rows, counts = results
            self._state.channels.learn_settings(channel, rows)
            self._state.wake_for_all(channel, counts, now)

        unset = dict.fromkeys(names_in(CHANNEL_PARAMETERS))
        values = {name.replace("-", "_"): v for name, v in {**unset, **settings}.items()}
        statements = (statement, SETTINGS_OF_CHANNEL, CHANNEL_COUNTS)
        self._run(Change(statements, {**values, "channel": channel}, effect))

    def pause(self, channel: str, seconds: Optional[int] = None) -> None:
        """Keeps all consumers from taking messages of a channel until `resume`, or for some
        seconds."""
        self._state.channels.reserve(check_name("channel", channel))
        until = NEVER if seconds is None else self.now() + seconds

        def effect(_: list[Any]) -> None:
            self._state.channels.pauses[channel] = until
            self._state.timers.schedule(ALL, until)

        self._run(Change((PAUSE,), {"channel": channel, "until": until}, effect))

    def resume(self, channel: str) -> None:
        """Ends a pause; it is no error if there is none."""
        now = self.now()

        def effect(results: list[Any]) -> None:
            self._state.channels.pauses.pop(channel, None)
            self._state.wake_for_all(channel, results[1], now)

        parameters = {"channel": check_name("channel", channel)}
        self._run(Change((RESUME, CHANNEL_COUNTS), parameters, effect))

    # -- inspection

    def channels(self) -> list[str]:
        """The sorted names of channels with messages, subscriptions, or consumers that wait or
        have been gone for less than three minutes."""
        self._submit_due()
        (rows,) = self._read(CHANNEL_NAMES)
        return sorted({name for (name,) in rows} | self._state.waiting.channels(self.now()))

    def list_channels(
        self,
        n: Optional[int] = None,
        after: str = "",
        like: str = "",
        order: str = "name",
        is_visible: Callable[[str], bool] = bool,
    ) -> list[str]:
        """Up to `n` names of the same channels, those after the channel `after` in the order:
        `name`, `ready` (the most first) or `oldest` (the oldest ready message first).

        Only visible names in which `like` occurs, in upper or lower case.
        """
        check_choice("order", order, CHANNEL_ORDERS)
        self._submit_due()
        self._read()  # waits for what was submitted before
        channels = ChannelList(self._store.read, self._state.waiting.channels(self.now()))
        text = like.casefold()
        return channels.names(n, after, order, lambda c: text in c.casefold() and is_visible(c))

    def topics(self, channel: Optional[str] = None) -> list[str]:
        """The sorted topics that have subscriptions: of one channel, or of all."""
        if channel is None:
            (rows,) = self._read(TOPIC_NAMES)
        else:
            (rows,) = self._read(TOPICS_OF_CHANNEL, channel=check_name("channel", channel))
        return [topic for (topic,) in rows]

    def subscribers(self, topic: str) -> list[str]:
        """The sorted channels that are subscribed to a topic."""
        (rows,) = self._read(CHANNELS_OF_TOPIC, topic=check_name("topic", topic))
        return [channel for (channel,) in rows]

    def pattern_subscribers(self, topic: str) -> dict[str, list[str]]:
        """The sorted patterns that match a topic, and the channels subscribed to each."""
        patterns = self._state.patterns.match_json(check_name("topic", topic))
        subscribers: dict[str, list[str]] = {}
        for pattern, channel in self._read(CHANNELS_OF_PATTERNS, patterns=patterns or "[]")[0]:
            subscribers.setdefault(pattern, []).append(channel)
        return subscribers

    def settings(self, channel: str) -> dict[str, Any]:
        """The settings of a channel: those that are set."""
        settings = dict(self._state.channels.settings.get(check_name("channel", channel), {}))
        if "backoff" in settings:
            settings["backoff"] = backoff_text(settings["backoff"])
        return settings

    def channels_of(self, ids: Sequence[int]) -> dict[int, str]:
        """The channel of each message that exists, by its id.

        Does not wait for what was submitted: a client learns an id only after its commit.
        """
        self._committer.check_thread()
        channels: dict[int, str] = {}
        for id in ids:
            (rows,) = self._store.read(CHANNEL_OF_MESSAGE, id=id)
            channels.update((id, channel) for id, channel, _ in rows)
        return channels

    def read_message(self, id: int) -> tuple[Message, str]:
        """A message and its state (of `STATES`), without taking it; `NotFound`."""
        self._submit_due()
        (rows,) = self._read(READ_MESSAGE, id=id, now=self.now())
        if not rows:
            raise NotFound(f"there is no message {id}")
        return listed_message(self._state.flights, rows[0])

    def list_messages(
        self,
        channel: str,
        state: Optional[str] = None,
        n: int = LISTED,
        after: Optional[int] = None,
        cut: int = PREVIEW_BYTES,
    ) -> list[tuple[Message, str]]:
        """Up to `n` messages of a channel and their states, those after the message `after`.

        In the order of delivery for the state `ready`, else by id.  Bodies are cut to one byte
        more than `cut`.
        """
        self._submit_due(channel)
        if state is not None:
            check_choice("state", state, STATES)
        if state == "ready" and after is not None:
            self.read_message(after)  # its place in the order is known only while it exists
        (counts,) = self._read(CHANNEL_COUNTS, channel=check_name("channel", channel))
        count = sum(sum(row[state is not None : 3]) for row in counts)  # of hidden ones, or of all
        statement = LIST_FEW if count <= MAX_SORTED else LIST_MANY
        (rows,) = self._store.read(
            LIST_READY if state == "ready" else statement, channel=channel, n=n, after=after,
            preview_bytes=cut, state=STATES.index(state) if state else None, now=self.now(),
        )  # fmt: skip
        return [listed_message(self._state.flights, row) for row in rows]

    def list_whole(
        self, channel: str, state: Optional[str], n: int, after: Optional[int]
    ) -> list[tuple[Message, str]]:
        """The same with whole bodies, of no more messages than reach MAX_BATCH_BYTES together."""
        return read_whole(
            lambda few, after: self.list_messages(channel, state, few, after, MAX_BLOB),
            self.max_message, n, after,
        )  # fmt: skip

    def dead_letters(
        self, n: int = LISTED, after: Optional[int] = None, reason: str = "", order: str = "newest"
    ) -> list[tuple[Message, str]]:
        """Up to `n` dead letters of all channels and their states, those after the message `after`:
        the `newest` or `oldest` first, of one of DEAD_REASONS or of all.

        Bodies are cut to one byte more than PREVIEW_BYTES.
        """
        reasons = (check_choice("reason", reason, DEAD_REASONS),) if reason else DEAD_REASONS
        newest = check_choice("order", order, DEAD_ORDERS) == "newest"
        if after is None:
            after = MAX_INTEGER if newest else MIN_INTEGER
        self._submit_due()
        self._read()  # waits for what was submitted before
        values = {"n": n, "after": after, "preview_bytes": PREVIEW_BYTES, "now": self.now()}
        statement = NEWEST_DEAD if newest else OLDEST_DEAD
        lists = [self._store.read(statement, reason=one, **values)[0] for one in reasons]
        rows = heapq.merge(*lists, key=lambda row: row[0], reverse=newest)
        return [listed_message(self._state.flights, row) for row in itertools.islice(rows, n)]

    def info(self, channel: str) -> dict[str, Any]:
        """A channel's counts, age, consumers, subscriptions, pause and settings."""
        self._submit_due(check_name("channel", channel))
        return self._info(channel, self._read)

    def infos(self, channels: Iterable[str]) -> list[dict[str, Any]]:
        """The same for several channels; waits only once for what was submitted before."""
        self._submit_due()
        self._read()
        return [self._info(channel, self._store.read) for channel in channels]

    def _info(self, channel: str, read: Callable[..., list[list[Any]]]) -> dict[str, Any]:
        counts, oldest, topics, patterns = read(
            CHANNEL_COUNTS, OLDEST_READY, TOPICS_OF_CHANNEL, PATTERNS_OF_CHANNEL, channel=channel
        )
        ready, in_flight, delayed, blocked = counts[0] if counts else (0, 0, 0, 0)
        posted = oldest[0][0]
        return {
            "channel": channel,
            "ready": ready,
            "delayed": delayed - blocked,
            "blocked": blocked,
            "in-flight": in_flight,
            "oldest": None if posted is None else max(int(self.now() - posted), 0),
            "waiting": self._state.waiting.count(channel),
            "topics": [topic for (topic,) in topics],
            "patterns": [pattern for (pattern,) in patterns],
            "paused": channel in self._state.channels.pauses,
            "settings": self.settings(channel),
            "events": self._state.events.totals(channel),
        }

    def channel_stats(self, channel: str) -> dict[str, int]:
        """How many messages of a channel are `ready`, and how many `hidden`."""
        self._submit_due(channel)
        (rows,) = self._read(CHANNEL_COUNTS, channel=check_name("channel", channel))
        ready, in_flight, delayed, _ = rows[0] if rows else (0, 0, 0, 0)
        return {"ready": ready, "hidden": in_flight + delayed}

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and current totals."""
        self._submit_due()
        subscriptions, newest = self._read(SUBSCRIPTION_TOTALS, NEWEST_MESSAGE)
        ready, in_flight, delayed, urgent, niced = self.statistics.message_totals()
        topics, subscribed = subscriptions[0]
        times = os.times()
        return {
            "start": self.start,
            **self.counters,
            "current-topics": topics,
            "current-subscriptions": subscribed,
            "current-channels": len(self.channels()),
            "current-messages": ready + in_flight + delayed,
            "current-messages-ready": ready,
            "current-messages-hidden": in_flight + delayed,
            "current-messages-urgent": urgent,
            "current-messages-niced": niced,
            "current-waiting": len(self._state.waiting.consumers()),
            "current-uptime": int(self.now() - self._started),
            "db-file": self._store.path,
            "db-size": self._store.size(),
            "db-free": self._store.disk_usage().get("linger_disk_free_bytes", -1),
            "pid": os.getpid(),
            "rusage-utime": times.user,
            "rusage-stime": times.system,
            "version": __version__,
            "msg-max-id": newest[0][0],
            "msg-max-size": self.max_message,
            "id": self.id,
            "hostname": socket.gethostname(),
        }

    def listen(self, kind: str, name: str, listener: Listener, memory: MemoryBudget) -> Reader:
        """A reader of what happens from now on in a channel, or is published on a topic; `kind`
        is `channels` or `topics`.  `memory` has room for what is not read yet."""
        check_name(kind[:-1], name)
        return self._state.live.listen(kind, name, listener, memory)

    # -- the database

    def backup(self, path: str) -> None:
        """Copies the database, as it is now, to a new file, from which a server can start.

        `Conflict` if there is a file already; when it returns the copy is whole and on disk.
        """
        with atomic_write(path) as part:
            self._committer.run(Operation())  # copies what was submitted, and no deleted file
            self._store.copy(part)

    def open_copy(self) -> BinaryIO:
        """The same copy in a file without a name, which is gone when it is closed."""
        self._committer.run(Operation())
        return self._store.open_snapshot()

    def check_health(self) -> None:
        """Returns if a message could be stored now: it writes to the database, and syncs, at most
        once in HEALTH_INTERVAL."""
        if not self._state.timers.is_alive():
            raise Unavailable("the ticker has stopped: restart the server")
        self._store.check_space()
        self._health.check()

    def is_working(self, seconds: float) -> bool:
        """Whether the ticker has come round within so many seconds.  Returns only when the
        committer does; nothing is written."""
        self._committer.run(Operation())
        return self._state.timers.has_ticked(max(seconds, 10 * TICK_INTERVAL))


Listed = TypeVar("Listed", bound=tuple[Any, ...])  # a message, and what else belongs to it


def read_whole(
    read: Callable[[int, Optional[int]], Sequence[Listed]],
    max_message: int,
    n: int,
    after: Optional[int],
) -> list[Listed]:
    """Up to `n` messages after one, as `read` reads a few of them, but no more than reach
    MAX_BATCH_BYTES together."""
    listed: list[Listed] = []
    size = 0
    step = max(MAX_BATCH_BYTES // max_message, 1)
    while page := read(min(step, n - len(listed)), after):
        for item in page:
            listed.append(item)
            size += len(item[0].body)
            if size >= MAX_BATCH_BYTES or len(listed) == n:
                return listed
        after = page[-1][0].id
    return listed


def subscription_values(
    state: State, channel: str, parameters: Mapping[str, object]
) -> dict[str, Any]:
    """The values of a subscription of a channel, but to what it subscribes."""
    _check_no_keys(parameters)
    check_parameters(parameters, MESSAGE_PARAMETERS)
    check_name("channel", channel)
    given = parse_parameters(parameters)
    validate_linger({**state.channels.settings.get(channel, {}), **given})
    unset = dict.fromkeys(names_in(MESSAGE_PARAMETERS))
    return {**unset, **given, "channel": channel, "now": state.clock.now()}


def _parse_settings(parameters: Mapping[str, object]) -> dict[str, Any]:
    _check_no_keys(parameters)
    check_parameters(parameters, CHANNEL_PARAMETERS)
    return parse_parameters(parameters, CHANNEL_PARAMETERS)


def _check_no_keys(parameters: Mapping[str, object]) -> None:
    for name in names_in(SINGLE_PARAMETERS):
        if parameters.get(name) is not None:
            raise BadRequest(f"{name} can be given only with a message")


# ---------------------------------------------------------------------------------------------
# Watch: what other servers of a cluster change in the rows, and how this one learns of it: messages
# that are ready while consumers wait here, what comes due, settings and pauses, broker time.
# ---------------------------------------------------------------------------------------------


class Watch:
    """A thread that looks again and again at what other servers of the cluster have changed."""

    def __init__(self, state: State, read: Callable[..., list[list[Any]]]) -> None:
        self._state = state
        self._read = read
        self._waker = Waker()
        self._stopping = False
        self._changes: Optional[str] = None  # how often settings and pauses had changed
        self._joined: set[str] = set()  # new sessions for which broker time was recorded
        self._swept_at = -NEVER  # when what is due was last read
        self._newest = -1  # the id of the newest publication then, 0 if there was none
        self._thread = threading.Thread(target=self._work, name="linger-watch", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._state.taking = collections.Counter()
        self._state.waiting.on_first = self._waker.wake
        self._thread.start()

    def stop(self) -> None:
        """Tells the thread to end."""
        if not self._stopping:
            self._stopping = True
            self._waker.wake()

    def join(self) -> None:
        """Waits until the thread has ended."""
        self._state.waiting.on_first = lambda: None
        if self._thread.is_alive():
            self._thread.join()
        self._waker.close()

    def _work(self) -> None:
        seconds = 0.0
        while not self._stopping:
            idle = self._state.waiting.is_empty()
            pause = IDLE_LOOK_INTERVAL if idle else LOOK_INTERVAL
            self._waker.wait(max(pause, seconds / LOOK_SHARE))
            began = time.monotonic()
            try:
                if not self._stopping:
                    self._look(began)
            except LingerError:  # no node answers: what needs one fails by itself
                pass
            except Exception:
                log(traceback.format_exc())
            seconds = time.monotonic() - began

    def _look(self, began: float) -> None:
        state, now = self._state, self._state.clock.now()
        statements = [LOOK_AROUND, READY_CHANNELS]
        sweeps = began - self._swept_at >= IDLE_LOOK_INTERVAL
        if sweeps:
            statements.append(DUE_SOON)
        (general,), ready, *due = self._read(
            *statements, names=json.dumps(state.waiting.awaited()), soon=now + 2 * TICK_INTERVAL
        )
        changes, latest, joining, newest = general
        if sweeps:
            self._swept_at = began
            self._look_for_publications(newest or 0)
        if latest is not None:
            state.clock.advance(latest)
        if changes != self._changes:
            self._changes = changes
            copied = (ALL_SETTINGS, ALL_PAUSES, ALL_PATTERNS, ALL_RETENTION)
            state.committer.submit(Change(copied, {}, self._learn))
        joined = set((joining or "").split())
        if joined - self._joined:
            state.committer.submit(state.clock.make_record(joined))
        self._joined = joined
        if ready or any(due):
            notice = functools.partial(self._notice, ready, due[0] if due else ())
            state.committer.submit(Change((), {}, notice))

    def _learn(self, results: list[Any]) -> None:
        """Takes over what this server keeps copies of."""
        state = self._state
        settings, pauses, patterns, retention = results
        state.channels.learn(settings, pauses)
        state.patterns.learn(patterns)
        state.learn_retention(retention)
        for moment in state.channels.pauses.values():
            state.timers.schedule(ALL, moment)

    def _notice(
        self, ready: Sequence[tuple[str, int]], due: Sequence[tuple[Any, ...]], _: list[Any]
    ) -> None:
        """Wakes consumers for messages that other servers made ready, and schedules what is due."""
        state, now = self._state, self._state.clock.now()
        state.timers.schedule_rows(due)
        for channel, count in ready:
            being_taken = state.taking[channel] if state.taking else 0
            state.wake(channel, count - being_taken, now)

    def _look_for_publications(self, newest: int) -> None:
        """Has streams look for what was published, up to the id `newest`, since the last look."""
        live = self._state.live
        if self._newest < 0 or not (live.topics or live.patterns):
            self._newest = newest
        while self._newest < newest:
            (rows,) = self._read(PUBLISHED_AFTER, after=self._newest, n=PIECE_ROWS)
            live.look_again({topic for _, topic in rows})
            self._newest = rows[-1][0] if rows else newest


# ---------------------------------------------------------------------------------------------
# Calls: the calls that wait for a change of the rows: for a reply to a message, or until a channel
# is drained.  Any server of a cluster may change the rows, so each call looks at them again and
# again, at least once in LONGEST_PAUSE.
# ---------------------------------------------------------------------------------------------


class Waits:
    """Threads that wait, each for a key, until a look at the rows finds something.

    A thread that finds it wakes the others that wait for its key, unless it was woken itself: then
    they have been, too.  Not by an Event, whose lock an exception of a signal handler may leave
    locked.
    """

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self._is_stopping = is_stopping
        self._lock = threading.RLock()  # guards all below
        self._wakeups: dict[str, set[queue.SimpleQueue[None]]] = {}  # of waiting threads, by key
        self._count = 0

    def wait(
        self,
        key: str,
        look: Callable[[], Optional[T]],
        seconds: float,
        is_disconnected: Callable[[], bool],
    ) -> Optional[T]:
        """What a look finds within some seconds; None if it finds nothing, or the client has
        gone.  `Unavailable` when the server stops."""
        wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()
        deadline, woken = time.monotonic() + seconds, False
        self._add(key, wakeups, 1)
        try:
            while True:
                found = look()
                if found is not None:
                    if not woken:
                        self.notify(key)
                    return found
                left = deadline - time.monotonic()
                if left <= 0 or is_disconnected():
                    return None
                if self._is_stopping():
                    raise Unavailable("the server stops")
                share = LOOK_PAUSE * max(self._count / LOOKS_AT_ONCE, 1)
                woken = False
                with contextlib.suppress(queue.Empty):
                    wakeups.get(timeout=min(left, share, LONGEST_PAUSE))
                    woken = True
        finally:
            self._add(key, wakeups, -1)

    @locked
    def _add(self, key: str, wakeups: queue.SimpleQueue[None], count: int) -> None:
        self._count += count
        waiting = self._wakeups.setdefault(key, set())
        (waiting.add if count > 0 else waiting.discard)(wakeups)
        if not waiting:
            del self._wakeups[key]

    @locked
    def notify(self, key: str) -> None:
        """Wakes the threads that wait for a key: they look at once."""
        for wakeups in self._wakeups.get(key, ()):
            wakeups.put(None)


class Reply(Operation):
    """Keeps the reply to a message that was called, and deletes the message."""

    def __init__(self, state: State, waits: Waits, parameters: dict[str, Any]) -> None:
        self._deletion = Deletion(state, parameters["id"], parameters["now"])
        super().__init__((*self._deletion.lookup, ADD_REPLY, DELETE_REPLIED), parameters)
        self.adds = self.size = len(parameters["body"])
        self._state = state
        self._waits = waits
        self._values = parameters

    def on_executed(self) -> None:
        if not self._deletion.executed(self):
            self._known = Operation((READ_REPLY,), self.parameters)
            self._state.committer.join_transaction(self._known)

    def on_commit(self) -> None:
        if self._deletion.committed(self):
            self._state.timers.schedule(ALL, self._values["now"] + REPLY_TTL)
            self._waits.notify(f"reply {self._values['id']}")

    def result(self) -> None:
        self.rows()
        if not self._deletion.is_done:
            id = self._values["id"]
            if self._known.rows()[0]:
                raise Conflict(f"message {id} was replied to already")
            self._deletion.check(self, f"nobody waits for a reply to message {id}: delete it")


class Calls:
    """The calls that wait for a reply, or until a channel is drained; thread-safe."""

    def __init__(
        self,
        state: State,
        new_message: Callable[..., dict[str, Any]],
        read: Callable[..., list[list[Any]]],
    ) -> None:
        """`new_message` is as for `Schedules`; `read` reads what is committed."""
        self._state = state
        self._read = read
        self._new_message = new_message
        self._waits = Waits(state.timers.is_stopping)

    def drained(
        self, channel: str, wait: float, is_disconnected: Callable[[], bool] = bool
    ) -> bool:
        """Whether a channel holds no message in any state, within `wait` seconds."""
        check_name("channel", channel)

        def look() -> Optional[bool]:
            (rows,) = self._read(CHANNEL_COUNTS, channel=channel)
            return None if rows else True

        return bool(self._waits.wait(f"drained {channel}", look, wait, is_disconnected))

    def call(
        self,
        channel: str,
        body: bytes,
        type: str = DEFAULT_TYPE,
        wait: float = CALL_WAIT,
        is_disconnected: Callable[[], bool] = bool,
        **parameters: object,
    ) -> tuple[bytes, str]:
        """Posts a message and waits for the reply to it: its body and type.

        `LingerError` with status 502 if the message was given up, 504 if no reply came in `wait`
        seconds, or before the server stopped; then it is deleted, if it was not yet delivered.
        """
        for name in ("dedup", "unique"):
            if parameters.get(name) is not None:
                raise BadRequest(f"a call takes no {name}: each is answered by itself")
        message = self._new_message(channel, body, type, parameters)
        message["headers"] += REPLY_LINE
        state = self._state
        id = state.committer.run(Post(state, message)).id
        found = self._await_reply(id, channel, wait, is_disconnected)
        if len(found[0]) > KEPT_REPLY:
            state.committer.submit(Operation((CLAIM_REPLY,), {"id": id, "body": b""}))
        return found

    def _await_reply(
        self, id: int, channel: str, wait: float, is_disconnected: Callable[[], bool]
    ) -> tuple[bytes, str]:
        """The reply to a message.  `Unavailable` only if the message was deleted: else something
        has changed, and who repeats the call may have it done twice."""
        look = functools.partial(self._look_for_reply, id)
        try:
            found = self._waits.wait(f"reply {id}", look, wait, is_disconnected)
            if found is None and not self._withdraw(id, channel):
                found = look(was_given_up=False)
        except Unavailable as error:  # the server stops, or the database fails
            withdrawn = False
            with contextlib.suppress(LingerError):
                withdrawn = self._withdraw(id, channel)
            if withdrawn:
                raise
            reason = str(error).replace(NOTHING_CHANGED, "")
            raise OutcomeUnknown(f"no reply to message {id} has come: {reason}") from error
        if found is None:
            raise OutcomeUnknown(f"no reply to message {id} came in {wait:g} seconds")
        return found

    def _withdraw(self, id: int, channel: str) -> bool:
        """Deletes a message that was called, unless it was delivered; returns whether it did."""
        state, now = self._state, self._state.clock.now()

        def effect(results: list[Any]) -> None:
            if results[0][0]:
                state.messages_deleted(channel, (id,), now)
                state.timers.schedule(channel, now)  # the next of its group

        change = Change((DELETE_CALLED,), {"id": id, "channel": channel}, effect)
        ((deleted, _),) = state.committer.run(change)
        return bool(deleted)

    def _look_for_reply(self, id: int, was_given_up: bool = True) -> Optional[tuple[bytes, str]]:
        """The reply to a message; an error with status 502 if it is gone, or a dead letter."""
        replies, messages = self._read(READ_REPLY, CALLED_MESSAGE, id=id)
        if replies:
            type, body = replies[0]
            return body, type
        if was_given_up and (not messages or messages[0][0]):
            reason, error = messages[0] if messages else ("deleted", "")
            text = f"message {id} was given up ({reason})"
            raise LingerError(f"{text}: {error}" if error else text, 502)
        return None

    def reply(
        self,
        id: int,
        body: bytes,
        type: str = DEFAULT_TYPE,
        lease: Optional[int] = None,
        expected_channel: Optional[str] = None,
    ) -> None:
        """Replies to a message that was called, and deletes it; `lease` as for `delete`.

        `NotFound`, or `Conflict` if it was replied to, delivered again, or not called.
        """
        parameters = {"id": id, "body": body, "type": type, "lease": lease, "ttl": REPLY_TTL}
        parameters.update(expected_channel=expected_channel, now=self._state.clock.now())
        self._state.committer.run(Reply(self._state, self._waits, parameters))


# ---------------------------------------------------------------------------------------------
# Schedules: messages that are posted at certain times.  The rows are the truth: memory holds only
# when to look at them next.  Each due time is done by one transaction, which looks whether it was
# done before; so it is posted once, by however many threads, runs or servers that try.
# ---------------------------------------------------------------------------------------------

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
CRON_FIELDS = (  # name, first and last number, names of the numbers from the first on
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 7, WEEKDAYS),  # 7 is 0 again
)
CRON_NAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
CRON_PART = re.compile(r"(?:\*|([0-9]{1,2}|[a-z]{3})(?:-([0-9]{1,2}|[a-z]{3}))?)(?:/([0-9]{1,2}))?")
LAST_DAY = 0  # among the days of a month: `l`
SEARCH_DAYS = 8 * 366  # two 29ths of February may lie so far apart: 2096 and 2104
SCHEDULE_PARAMETERS = tuple(p for p in ALL_PARAMETERS if p.name not in ("dedup", "dedup-for"))


class Cron:
    """The due times of a cron expression, by the wall clock of a time zone.

    Where that clock is set forward, a time that is skipped is due as if it were not: 2:30 at what
    is 3:30 then.  A time that comes twice is due the first time; both times if `hour` is each one.
    """

    def __init__(self, text: str, tz: str = "UTC") -> None:
        """`BadRequest` says what is wrong with the five fields, or with the name of the zone."""
        lowered = text.lower().strip()
        fields = CRON_NAMES.get(lowered, lowered).split()
        if len(fields) != len(CRON_FIELDS) or len(text) > MAX_CRON:
            raise BadRequest(
                "cron must be five fields (minute, hour, day of the month, month, day of the week)"
                f" of at most {MAX_CRON} characters, or one of {', '.join(CRON_NAMES)}"
            )
        numbers = [_parse_cron_field(field, *kind) for field, kind in zip(fields, CRON_FIELDS)]
        self._minutes, self._hours = sorted(numbers[0]), sorted(numbers[1])
        self._days, self._months, self._weekdays = numbers[2:]
        self._any_day = fields[2].startswith("*") or fields[4].startswith("*")
        self.zone = find_zone(tz)
        if next(self._times(datetime.datetime(2000, 1, 1)), None) is None:
            raise BadRequest("cron is never due: none of its months has such a day")

    def next_after(self, moment: float) -> float:
        """The first due time after a moment, both in Unix time."""
        local = datetime.datetime.fromtimestamp(moment, self.zone).replace(tzinfo=None)
        change = max(self._change_near(local), self._change_near(next(self._times(local))))
        next_due, last = NEVER, datetime.datetime.max
        for at in self._times(local - change):
            if at > last:  # no later one is due before
                break
            first = at.replace(tzinfo=self.zone).timestamp()
            second = at.replace(tzinfo=self.zone, fold=1).timestamp()  # of a skipped one earlier
            due = second if first <= moment < second and len(self._hours) == 24 else first
            if moment < due < next_due:
                next_due, last = due, min(last, at + change)
        return next_due

    def _change_near(self, at: datetime.datetime) -> datetime.timedelta:
        """By how much the clock is set forward or back within a day of a time."""
        day = datetime.timedelta(1)
        before, after = (t.replace(tzinfo=self.zone).utcoffset() for t in (at - day, at + day))
        return abs(cast(datetime.timedelta, after) - cast(datetime.timedelta, before))

    def _times(self, start: datetime.datetime) -> Iterator[datetime.datetime]:
        """The times that match, from a time on, without their zone."""
        day = start.date()
        end = day + datetime.timedelta(SEARCH_DAYS)
        while day < end:
            if day.month not in self._months:
                day = (day.replace(day=28) + datetime.timedelta(4)).replace(day=1)
                continue
            if self._matches(day):
                for hour, minute in itertools.product(self._hours, self._minutes):
                    at = datetime.datetime(day.year, day.month, day.day, hour, minute)
                    if at >= start:
                        yield at
            day += datetime.timedelta(1)

    def _matches(self, day: datetime.date) -> bool:
        """As in other crons: if neither field for days is `*`, it is enough that one matches."""
        is_last = (day + datetime.timedelta(1)).month != day.month
        by_month = day.day in self._days or (is_last and LAST_DAY in self._days)
        by_week = day.isoweekday() % 7 in self._weekdays
        return by_month and by_week if self._any_day else by_month or by_week


def _parse_cron_field(
    text: str, name: str, lowest: int, highest: int, names: Sequence[str]
) -> frozenset[int]:
    """The numbers in a field: a list of `*`, numbers, names, ranges, and steps of a range."""
    numbers: set[int] = set()
    for part in text.split(","):
        if part == "l" and name == "day of the month":
            numbers.add(LAST_DAY)
            continue
        found = _parse_cron_part(part, lowest, highest, names)
        if not found:
            words = f" or {names[0]} to {names[-1]}" if names else ""
            raise BadRequest(
                f"cron has the {name} {part}: it must be *, {lowest} to {highest}{words}, a range"
                " as 1-5, steps of one as */15 or 1-9/2, or several of these with commas between"
            )
        numbers.update(n % 7 for n in found) if names is WEEKDAYS else numbers.update(found)
    return frozenset(numbers)


def _parse_cron_part(part: str, lowest: int, highest: int, names: Sequence[str]) -> Sequence[int]:
    """The numbers that a part of the list stands for; none if it is malformed."""
    found = CRON_PART.fullmatch(part)
    if not found:
        return ()
    one, other, step = found[1] or str(lowest), found[2], int(found[3] or 1)
    first = _cron_number(one, lowest, names)
    last = _cron_number(other or one, lowest, names) if found[1] else highest
    if last == 0 < first and names is WEEKDAYS:  # fri-sun
        last = 7
    is_single = found[1] and not other
    if not lowest <= first <= last <= highest or not step or (is_single and found[3]):
        return ()
    return range(first, last + 1, step)


def _cron_number(text: str, lowest: int, names: Sequence[str]) -> int:
    """A number or its name; -1 for another word."""
    if text in names:
        return lowest + names.index(text)
    return int(text) if text.isdigit() else -1


def find_zone(name: str) -> datetime.tzinfo:
    """A time zone of this machine's data; UTC needs none."""
    if name == "UTC":
        return datetime.timezone.utc
    import zoneinfo  # here: only schedules need it

    problem = "this machine knows no time zones but UTC: install the package tzdata"
    with contextlib.suppress(zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        zoneinfo.ZoneInfo("UTC")
        problem = f"there is no time zone {name}: use one as Europe/Berlin"
        return zoneinfo.ZoneInfo(name)
    raise BadRequest(problem)


class Schedule(NamedTuple):
    """A schedule as it is stored."""

    name: str
    channel: str
    cron: str  # or empty
    tz: str
    every: int  # seconds, or 0
    catch_up: int  # whether to post once after due times were missed
    next_at: float  # in Unix time for cron, in broker time for `every`
    last_at: Optional[float]  # when it was posted, or was to be, the last time, in Unix time
    last_id: Optional[int]  # of its message
    last_error: str  # why that was not posted, or empty
    parameters: str  # of the message, in JSON
    version: int  # grows with each change
    type: str
    body: bytes


# While cron, tz and every stay the same, so does the next due time.
SAME_TIMES = "cron = excluded.cron and tz = excluded.tz and every = excluded.every"

SET_SCHEDULE = f"""
insert into schedules (name, channel, cron, tz, every, catch_up, next_at, done_until, parameters,
    type, body)
select :schedule, :channel, :cron, :tz, :every, :catch_up, :next, :wall, :parameters, :type, :body
where exists (select 1 from schedules where name = :schedule)
    or (select count(*) from schedules) < :max_schedules
on conflict (name) do update set
    channel = excluded.channel,
    cron = excluded.cron,
    tz = excluded.tz,
    every = excluded.every,
    catch_up = excluded.catch_up,
    next_at = case when {SAME_TIMES} then next_at else excluded.next_at end,
    done_until = case when {SAME_TIMES} then done_until else excluded.done_until end,
    version = version + 1,
    last_error = '',
    parameters = excluded.parameters,
    type = excluded.type,
    body = excluded.body
where channel = coalesce(:expected_channel, channel)
"""

DELETE_SCHEDULE = """
delete from schedules
where name = :schedule and channel = coalesce(:expected_channel, channel)
"""

SCHEDULE_TIMES = """
select name, cron, tz, next_at, done_until
from schedules
"""

READ_SCHEDULE = f"""
select {", ".join(Schedule._fields)}
from schedules
where name = :schedule
"""

LIST_SCHEDULES = f"""
select {", ".join(Schedule._fields[:-1])}, substr(body, 1, :preview_bytes + 1)
from schedules
order by name
"""

SKIP_DUE_TIME = f"""
update schedules
set next_at = :next, done_until = :wall, last_error = coalesce(:error, last_error)
where {IS_EXPECTED}
"""


class Schedules:
    """The calls for schedules; thread-safe.  The ticker posts what is due."""

    def __init__(self, state: State, new_message: Callable[..., dict[str, Any]]) -> None:
        """`new_message(channel, body, type, given)` checks a message that is to be posted, and
        returns the parameters of its statement."""
        self._state = state
        self._read = state.committer.read
        self._new_message = new_message
        self._changed = True  # whether to look at the rows
        self._look_at = (0.0, 0.0)  # when to look otherwise, in broker time and in Unix time
        self._ahead = 0.0  # by how much the wall clock was ahead of broker time, seconds
        self._lock = threading.Lock()  # held while what is due is posted

    def _clocks(self) -> tuple[float, float]:
        """Broker time and Unix time."""
        return self._state.clock.now(), self._state.clock.source.time()

    def put(
        self,
        name: str,
        channel: str,
        body: bytes,
        type: str = DEFAULT_TYPE,
        cron: Optional[str] = None,
        tz: Optional[str] = None,
        every: Optional[int] = None,
        catch_up: bool = True,
        expected_channel: Optional[str] = None,
        **parameters: Unpack[PostFields],
    ) -> None:
        """Posts a message to a channel again and again: when a `cron` expression says so, by the
        wall clock of a time zone (`tz`, UTC if it is not given), or `every` so many seconds.

        Replaces the schedule of that name, if that posts to the `expected_channel`; then its next
        due time stays unless the times change.  After due times were missed there is one post,
        with `catch_up`, or none.
        """
        check_name("schedule", name)
        check_parameters(parameters, SCHEDULE_PARAMETERS)
        now, wall = self._clocks()
        next_at = _first_due(cron, tz, every, now, wall)
        self._new_message(channel, body, type, parameters)
        values = {
            "schedule": name, "channel": channel, "cron": cron or "", "tz": tz or "UTC",
            "every": every or 0, "catch_up": catch_up, "next": next_at, "wall": wall,
            "parameters": _json_of(parameters), "type": type, "body": body,
            "expected_channel": expected_channel, "max_schedules": MAX_SCHEDULES,
        }  # fmt: skip
        (changed, _), known = self._state.committer.run(
            Change((SET_SCHEDULE, READ_SCHEDULE), values, self._note_change)
        )
        if not changed and known:
            raise Conflict("the schedule was changed meanwhile")
        if not changed:
            raise Full(f"there are {MAX_SCHEDULES} schedules, and no more can be made")

    def _note_change(self, _: list[Any]) -> None:
        self._changed = True

    def remove(self, name: str, expected_channel: Optional[str] = None) -> None:
        """Deletes a schedule, if it posts to the `expected_channel`; `NotFound`."""
        names = {"schedule": name, "expected_channel": expected_channel}
        ((deleted, _),) = self._state.committer.run(Operation((DELETE_SCHEDULE,), names))
        if not deleted:
            raise NotFound(f"there is no schedule {name}")

    def read(self, name: str) -> Schedule:
        """A schedule; `NotFound`."""
        (rows,) = self._read(READ_SCHEDULE, schedule=check_name("schedule", name))
        if not rows:
            raise NotFound(f"there is no schedule {name}")
        return Schedule(*rows[0])

    def read_all(self, cut: int = PREVIEW_BYTES) -> list[Schedule]:
        """All schedules, by name, with bodies that are cut to one byte more than `cut`."""
        (rows,) = self._read(LIST_SCHEDULES, preview_bytes=cut)
        return [Schedule(*row) for row in rows]

    def next_due(self, schedule: Schedule) -> tuple[float, float]:
        """When a schedule is due: in how many seconds, and in Unix time."""
        now, wall = self._clocks()
        left = max(schedule.next_at - (wall if schedule.cron else now), 0.0)
        return left, wall + left

    def post(self, name: str, expected_channel: Optional[str] = None) -> PostResult:
        """Posts the message of a schedule now; its due times stay as they are."""
        schedule = self.read(name)
        if expected_channel not in (None, schedule.channel):
            raise NotFound(f"there is no schedule {name}")
        result: PostResult = self._state.committer.run(Post(self._state, self._message(schedule)))
        return result

    def _message(self, schedule: Schedule) -> dict[str, Any]:
        given = json.loads(schedule.parameters)
        return self._new_message(schedule.channel, schedule.body, schedule.type, given)

    # -- due times

    def post_due(self) -> None:
        """Posts what is due.  The ticker calls this at least once in TICK_INTERVAL, which is often
        enough to see when the wall clock is set."""
        with self._lock:
            now, wall = self._clocks()
            stepped = abs(wall - now - self._ahead) > CLOCK_STEP
            self._ahead = wall - now
            look_at = self._look_at
            if self._changed or stepped or now >= look_at[0] or wall >= look_at[1]:
                while due := self._find_due(now, wall):
                    for start in range(0, len(due), FIRST_PIECE):
                        self._do(due[start : start + FIRST_PIECE], now, wall)

    def _find_due(self, now: float, wall: float) -> list[str]:
        """The names of those that are due; if there are none, notes when to look again."""
        self._changed = False
        (rows,) = self._read(SCHEDULE_TIMES)
        look_at = [now + SCHEDULE_LOOK, wall + SCHEDULE_LOOK]
        due = []
        for name, cron, _, next_at, done_until in rows:
            # The wall clock was wrong when it said that all due times up to then were done.
            was_wrong = cron and done_until > wall + CLOCK_CORRECTION
            if was_wrong or next_at <= (wall if cron else now):
                due.append(name)
            look_at[bool(cron)] = min(look_at[bool(cron)], next_at)
        if not due:
            self._look_at = look_at[0], look_at[1]
            self._state.timers.tick_at = min(look_at[0], look_at[1] - wall + now)
        return due

    def _do(self, names: Sequence[str], now: float, wall: float) -> None:
        """Posts what is due in some schedules, or moves them to their next due time."""
        operations = []
        for name in names:
            with contextlib.suppress(NotFound):
                operations.append(self._operation(self.read(name), now, wall))
        for operation in operations:  # only now: a read waits for what was submitted before
            self._state.committer.submit(operation)
        self._state.committer.run(Operation())
        for operation in operations:
            operation.rows()  # raises what it failed with: then the due time is not done

    def _operation(self, schedule: Schedule, now: float, wall: float) -> Operation:
        """What to do with a schedule that was due."""
        clock = wall if schedule.cron else now
        values: dict[str, Any] = {
            "schedule": schedule.name, "expected": schedule.next_at, "version": schedule.version,
            "wall": wall, "next": clock + SCHEDULE_LOOK, "error": None,
        }  # fmt: skip
        try:
            if schedule.cron:
                values["next"] = Cron(schedule.cron, schedule.tz).next_after(wall)
            else:
                missed = (now - schedule.next_at) // schedule.every
                values["next"] = schedule.next_at + (missed + 1) * schedule.every
            is_missed = clock - schedule.next_at >= MISSED_AFTER and not schedule.catch_up
            if schedule.next_at <= clock and not is_missed:
                return PostScheduled(self._state, self._message(schedule), values)
        except LingerError as error:
            values["error"] = str(error)
        return Operation((SKIP_DUE_TIME,), values)


def _json_of(given: Mapping[str, object]) -> str:
    """Parameters as they were given, but numbers as such."""
    parsed = parse_parameters(given, SCHEDULE_PARAMETERS)
    return json.dumps({n: v if isinstance(v, int) else given[n] for n, v in parsed.items()})


def _first_due(
    cron: Optional[str], tz: Optional[str], every: Optional[int], now: float, wall: float
) -> float:
    """When a new schedule is due, in Unix time for `cron`, else in broker time."""
    if (cron is None) == (every is None) or (cron is None and tz is not None):
        raise BadRequest("a schedule needs either cron, with or without tz, or every")
    if cron is not None:
        return Cron(cron, tz or "UTC").next_after(wall)
    return now + parse_integer("every", every, 1, MAX_EVERY)


class PostScheduled(Post):
    """Posts the message of a schedule, unless its due time is done."""

    def __init__(
        self, state: State, message: Mapping[str, Any], schedule: Mapping[str, Any]
    ) -> None:
        error = CHANNEL_IS_FULL.format(message["hlm"])
        super().__init__(state, {**message, **schedule, "error": error})
        self.statements = (*POST_KEYED[:KEYED_PLACE], POST_SCHEDULED, SCHEDULE_POSTED)
        self._place = KEYED_PLACE


# ---------------------------------------------------------------------------------------------
# Topics: subscriptions to patterns of topics, and publications that are kept for later readers.
# ---------------------------------------------------------------------------------------------


class PatternSubscriptions:
    """The calls for subscriptions to patterns; thread-safe.

    `State.patterns` follows the rows, after each commit: a publication finds there which patterns
    match its topic, and in the rows which channels are subscribed to them.
    """

    def __init__(self, state: State, store: Transactions) -> None:
        self._state = state
        self._store = store
        self._read = state.committer.read
        state.patterns.learn(store.read(ALL_PATTERNS)[0])

    def subscribe(self, channel: str, pattern: str, **parameters: Unpack[MessageFields]) -> None:
        """Subscribes a channel to all topics that match a pattern: copies get `parameters`;
        replaces a subscription.

        A channel gets one copy of a publication.  A subscription to the topic itself wins over
        those to patterns, and of these the first by name.
        """
        values = subscription_values(self._state, channel, parameters)
        values.update(pattern=check_name("pattern", pattern), max_patterns=MAX_TOPIC_PATTERNS)
        self._store.check_space()
        self._state.channels.reserve(channel)

        def effect(results: list[Any]) -> None:
            if results[0][0]:
                self._state.patterns.add(pattern, channel)
                self._state.counters["subscription-add"] += 1

        ((changed, _),) = self._state.committer.run(Change((SUBSCRIBE_PATTERN,), values, effect))
        if not changed:
            raise Full(f"there are {MAX_TOPIC_PATTERNS} subscriptions to patterns, the limit")

    def unsubscribe(self, channel: str, pattern: str) -> None:
        """Ends a subscription; it is no error if there is none."""
        names = {
            "channel": check_name("channel", channel),
            "pattern": check_name("pattern", pattern),
        }

        def effect(results: list[Any]) -> None:
            self._state.patterns.discard(pattern, channel)
            self._state.counters["subscription-delete"] += results[0][0]

        self._state.committer.run(Change((UNSUBSCRIBE_PATTERN,), names, effect))

    def names(self, channel: Optional[str] = None) -> list[str]:
        """The sorted patterns that have subscriptions: of one channel, or of all."""
        if channel is None:
            (rows,) = self._read(ALL_PATTERNS)
        else:
            (rows,) = self._read(PATTERNS_OF_CHANNEL, channel=check_name("channel", channel))
        return list(dict.fromkeys(row[0] for row in rows))


def parse_since(text: str) -> tuple[int, float]:
    """The id and the age that `since` stands for: it means publications after that id, and no
    older than that many seconds."""
    if text == "all":
        return 0, NEVER
    found = re.fullmatch("([0-9]{1,18})([smhd]?)", text)
    if not found:
        raise BadRequest("since must be the id of a publication, an age as 90s, 5m, 2h, 1d, or all")
    if found[2]:
        return 0, float(found[1]) * {"s": 1, "m": 60, "h": 3_600, "d": 86_400}[found[2]]
    return int(found[1]), NEVER


class Retention:
    """The calls for publications that are kept; thread-safe.

    `State.retention` follows the rows, after each commit: a publication finds there whether its
    topic keeps any.
    """

    def __init__(self, state: State, store: Transactions, hlm: int, max_message: int) -> None:
        self._state = state
        self._store = store
        self._hlm = hlm
        self._max_message = max_message
        self._read = state.committer.read
        self._trimmed_at = 0.0
        state.learn_retention(store.read(ALL_RETENTION)[0])

    def put(self, topic: str, keep: Optional[int] = None, keep_for: Optional[int] = None) -> None:
        """Keeps the last `keep` publications of a topic, each for at most `keep_for` seconds, from
        now on; what is beyond that already goes."""
        check_name("topic", topic)
        if keep is None and keep_for is None:
            raise BadRequest("give keep, keep-for, or both")
        parse_parameters({"keep": keep, "keep-for": keep_for}, RETENTION_PARAMETERS)
        if not self._set(SET_RETENTION, topic, keep, keep_for):
            raise Full(f"{MAX_KEEPING_TOPICS} topics keep publications, and no more can")

    def clear(self, topic: str) -> None:
        """Keeps no more publications of a topic, and deletes those that were kept; it is no error
        if there are none."""
        self._set(CLEAR_RETENTION, check_name("topic", topic), 0, None)

    def _set(
        self, statement: str, topic: str, keep: Optional[int], keep_for: Optional[int]
    ) -> bool:
        """Runs a statement that changes the settings of a topic; returns whether they changed."""
        values = {
            "topic": topic, "keep": keep, "keep_for": keep_for, "max_topics": MAX_KEEPING_TOPICS,
        }  # fmt: skip

        def effect(results: list[Any]) -> None:
            if results[0][0]:
                self._state.retention[topic] = keep, keep_for

        ((changed, _),) = self._state.committer.run(Change((statement,), values, effect))
        if changed:
            with contextlib.suppress(LingerError):  # the change is made: the ticker trims the rest
                self._trim(topic)
        return bool(changed)

    def _trim(self, topic: str, end: float = NEVER) -> None:
        """Deletes the publications of a topic that are beyond its settings, in pieces, with room
        for other calls between them; begins no further piece after `end`."""

        def effect(results: list[Any]) -> None:
            if results[1][0]:
                self._state.retention.pop(topic, None)

        size = PieceSize(FIRST_PIECE)
        deleted = n = size.rows
        while deleted == n and time.perf_counter() < end:
            n = size.rows
            values = {"topic": topic, "trim": n, "now": self._state.clock.now()}
            piece = Change((TRIM_PUBLICATIONS, FORGET_RETENTION), values, effect)
            piece.is_bulk = True
            ((deleted, _), _) = self._state.committer.run(piece)
            size.adapt(piece.seconds, is_full=True)

    def trim_due(self, seconds: float) -> None:
        """Deletes publications that were kept for long enough, also those that a killed server has
        left; begins no further piece after so many seconds.  The ticker calls this at each tick."""
        now, end = self._state.clock.now(), time.perf_counter() + seconds
        if self._state.retention and now - self._trimmed_at >= TRIM_INTERVAL:
            for (topic,) in self._store.read(TOPICS_TO_TRIM, now=now)[0]:
                self._trim(topic, end)
            if time.perf_counter() < end:
                self._trimmed_at = now

    def settings(self, topic: str) -> dict[str, int]:
        """What is set for a topic."""
        keep, keep_for = self._state.retention.get(check_name("topic", topic), (None, None))
        named = {"keep": keep, "keep-for": keep_for}
        return {name: value for name, value in named.items() if value}

    def kept(
        self, topic: str, since: str = "all", n: int = LISTED, cut: int = PREVIEW_BYTES
    ) -> list[Message]:
        """Up to `n` publications that are kept, the oldest first, without a channel; with bodies
        that are cut to one byte more than `cut`."""
        return self._kept([check_name("topic", topic)], since, n, cut)

    def kept_whole(self, topic: str, since: str, n: int) -> list[Message]:
        """The same with whole bodies, of no more than reach MAX_BATCH_BYTES together."""
        topics = [check_name("topic", topic)]

        def read(few: int, after: Optional[int]) -> list[tuple[Message]]:
            return [*zip(self._kept(topics, since if after is None else str(after), few, MAX_BLOB))]

        return [publication for (publication,) in read_whole(read, self._max_message, n, None)]

    def _kept(
        self, topics: Sequence[str], since: str, n: int, cut: int = MAX_EVENT_BODY
    ) -> list[Message]:
        values = self._since(since)
        (rows,) = self._read(
            KEPT_PUBLICATIONS, topics=json.dumps(topics), n=n, preview_bytes=cut, **values
        )
        return [publication_of(*row) for row in rows]

    def _since(self, since: str) -> dict[str, Any]:
        after, seconds = parse_since(since)
        values = {"seconds": seconds, "now": self._state.clock.now()}
        if seconds < NEVER:
            (((after,),),) = self._read(OLD_PUBLICATIONS, commit_time=COMMIT_TIME, **values)
        return {**values, "after": after}

    def replay(
        self, kind: str, name: str, since: Optional[str], listen: Callable[[], Reader]
    ) -> Union[Replay, Reader]:
        """A reader of what is kept of one of the `topics`, or of those that match one of the
        `patterns` (`kind`), and then of what `listen` gives; without `since` only of that.

        On a cluster it reads also what other servers publish, where that is kept.
        """
        check_name(kind[:-1], name)
        if since is None:
            if not self._store.is_shared:
                return listen()
            since = str(self._read(NEWEST_PUBLICATION)[0][0][0])
        tree = PatternTree()
        tree.add(name, "")
        # Bounded: during a long stream, topics may come and go.
        matches = functools.lru_cache(MAX_KEEPING_TOPICS)(lambda topic: bool(tree.match(topic)))

        def topics() -> list[str]:
            if kind == "topics":
                return [name]
            return [topic for topic, *_ in self._read(ALL_RETENTION)[0] if matches(topic)]

        live = self._state.live
        return Replay(
            listen, lambda since, n: self._kept(topics(), since, n), since,
            lambda: live.is_closed, self._store.is_shared,
        )  # fmt: skip

    def subscribe(
        self, channel: str, topic: str, since: str, **parameters: Unpack[MessageFields]
    ) -> None:
        """Subscribes a channel to a topic, and copies to it what is kept, in one transaction; if
        it is subscribed already, replaces the parameters and copies nothing."""
        values = subscription_values(self._state, channel, parameters)
        values.update(self._since(since), topic=check_name("topic", topic), hlm=self._hlm)
        values["max_subscribers"] = MAX_SUBSCRIBERS
        self._store.check_space()
        self._state.channels.reserve(channel)
        (((count, size),),) = self._read(KEPT_TOTALS, max_copies=MAX_BATCH_COPIES, **values)
        if count > MAX_BATCH_COPIES or size > MAX_BATCH_COPY_BYTES:
            raise TooLarge(
                f"at most {MAX_BATCH_COPIES} publications with {MAX_BATCH_COPY_BYTES} bytes are"
                " copied, and these are more: give a later since"
            )
        self._state.committer.run(Backfill(self._state, values))


class Backfill(Operation):
    """Subscribes a channel to a topic, and adds copies of what is kept if it is new there.

    So the call is idempotent, as a PUT must be: clients and proxies repeat it.
    """

    adds = MAX_BATCH_COPY_BYTES  # at most

    def __init__(self, state: State, values: dict[str, Any]) -> None:
        statements = (CHECK_BACKFILL_FITS, SUBSCRIBE_IF_IT_FITS, BACKFILL, PUBLISHED)
        super().__init__((*statements, CLEAR_BATCH_FITS), values)
        self._state = state
        self._channel: str = values["channel"]
        self._hlm: int = values["hlm"]
        self._now: float = values["now"]

    def on_commit(self) -> None:
        _, (subscribed, _), _, copies, _ = self.results
        self._state.counters["subscription-add"] += subscribed
        for copy in copies_of(copies):
            self._state.counters["publish"] += 1
            self._state.messages_added(copy["channel"], (copy,), self._now, woken=0)

    def result(self) -> None:
        (fits, _), (subscribed, _), *_ = self.rows()
        if not fits:
            hlm = self._state.channels.settings.get(self._channel, {}).get("hlm", self._hlm)
            raise Full(f"the publications do not fit below the channel's high-level mark of {hlm}")
        if not subscribed:
            raise Full(TOPIC_IS_FULL.format(MAX_SUBSCRIBERS))


def kept_together(publications: Sequence[Publication]) -> range:
    """The ids of those in a batch that are kept, which follow each other: of those that are no
    duplicates, or of all if the whole batch is repeated."""
    kept = [publication for publication in publications if publication.id]
    ids = [p.id for p in kept if not p.duplicate] or [p.id for p in kept]
    if not ids or any(id + 1 != after for id, after in zip(ids, ids[1:])):
        return range(0)
    return range(ids[0], ids[-1] + 1)


class Replay:
    """A reader that gets what is kept, and then what is published, each once.

    It listens before it reads the last of what is kept, so that it misses nothing, and passes over
    the events of what it has read.  Ids are in the order of the commits, also of several topics.

    On a cluster other servers may have published before and after each event.  So what is kept is
    only read: when there are events, or after `Live.look_again`.
    """

    def __init__(
        self,
        listen: Callable[[], Reader],
        kept: Callable[[str, int], list[Message]],
        since: str,
        is_closed: Callable[[], bool] = bool,
        is_shared: bool = False,
    ) -> None:
        """`kept(since, n)` returns up to `n` publications; `is_closed()`: whether streams end."""
        parse_since(since)
        self._listen = listen
        self._kept = kept
        self._is_closed = is_closed
        self._is_shared = is_shared
        self._since = since
        self._page = REPLAY_PAGE
        self._last = 0  # the id of the last publication
        self._reader: Optional[Reader] = None
        self._is_behind = True  # whether there may be kept ones that it has not read

    def events(self) -> Optional[list[Event]]:
        """As `Reader.events`."""
        while True:
            while self._is_behind:
                if self._is_closed():
                    return None
                kept, has_more = self._next()
                if self._reader is None and not has_more:
                    self._reader = self._listen()
                elif not kept:
                    self._is_behind = False
                if kept:
                    return kept
            assert self._reader is not None
            events = self._reader.events()
            if not events:
                self._is_behind = self._is_shared
                return events
            last = self._last
            if self._is_shared and any(event.message.id for event in events):
                self._is_behind, last = True, MAX_INTEGER  # those are read
            news = [e for e in events if not 0 < e.message.id <= last]
            if news:
                return news

    def _next(self) -> tuple[list[Event], bool]:
        """The events of what is kept, but not many bytes at once, since its reader may be slow;
        and whether there are more."""
        page = self._kept(str(self._last) if self._last else self._since, self._page)
        has_more = len(page) == self._page
        events: list[Event] = []
        size = 0
        for event in (Event("", publication, MAX_EVENT_BODY) for publication in page):
            size += event.size
            if size > SMALL_AMOUNT and events:
                break
            events.append(event)
            self._last = event.message.id
        self._page = min(2 * max(len(events), 1), REPLAY_PAGE)
        return events, has_more or len(events) < len(page)

    def close(self) -> None:
        """Ends it; may be repeated."""
        if self._reader is not None:
            self._reader.close()


# ---------------------------------------------------------------------------------------------
# Broker: the public calls.  Knows nothing of sockets, headers, JSON, argv.
#
# How a call runs through the file, from its connection (C) and in the committer thread (W):
#
# POST      1. C: the connection's thread reads the request and finds its route
#           2. C: the route's method calls `Broker.post_async` with the reply as `on_done`
#           3. C: `NewMessages` checks and completes the parameters, `Channels.reserve` the channel;
#                 what is due in the channel is submitted first (`ProcessDue`)
#           4. C: `Committer.submit` puts a `Post` on the list; the thread reads on
#           5. W: `Store.transact` runs its statements; `Post.on_executed` joins the take of a
#                 waiting consumer to the transaction
#           6. W: the transaction is committed and synced
#           7. W: `Post.on_commit` counts the message, and schedules its delay or expiry
#           8. W: `Post.on_done` sends the response, made of `Post.result`
#
# GET that  1. C: as above: the route's method calls `Broker.consumer` and `Broker.take_async`
# waits     2. W: `Take` finds no message; `Take.on_commit` puts the consumer into the `WaitingList`
#           3. C: the thread listens for a hang-up and for the end of the wait: `Broker.cancel`
#           4. W: another operation makes a message ready (as 5. above) and calls `State.wake`
#           5. W: `WaitingList.pop` gives the consumer; if its client is there, a second `Take`
#                 joins the transaction, behind what is in it and before what comes later
#           6. W: `Take.on_commit` counts the delivery and schedules the timeout
#           7. W: `Take.on_done` sends the message; one that cannot be sent is undone (`UndoTake`)
#
# DELETE    1. C: as above: the route's method calls `Broker.delete_async`
#           2. C: what is due is submitted first, then `Committer.submit` gets a `Delete`
#           3. W: its statement deletes the row only if the lease is the latest
#           4. W: if it deleted nothing, `Delete.on_executed` joins a look-up of the lease
#           5. W: after the commit `Delete.on_commit` counts it, and `Delete.on_done` sends the
#                 response: `Delete.result` returns, or raises `NotFound` or `Conflict`
# ---------------------------------------------------------------------------------------------

READY, DELAYED = STATES.index("ready"), STATES.index("delayed")
BatchItem = tuple[bytes, str, Mapping[str, object]]  # body, type and parameters of a message
# All that POST_MESSAGE asks for and that a message need not say.
NEW_MESSAGE = {**DEFAULTS, "scope": "", "dedup_for": 0, "batch": 0, "state": READY, "expires_at": 0}


class BatchKey(str):
    """A dedup key given for a whole batch: sending the batch again adds nothing.

    Each of its messages has the key together with its position, apart from the keys of single
    messages.
    """

    position: int

    def __new__(cls, key: str, position: int) -> BatchKey:
        batch_key = super().__new__(cls, key)
        batch_key.position = position
        return batch_key


class NewMessages:
    """Checks what is posted or published, and completes the parameters of its statement."""

    def __init__(
        self,
        broker: Administration,
        clock: BrokerClock,
        hlm: int,
        settings: Mapping[str, dict[str, Any]],
    ) -> None:
        """`hlm`: where a channel has none of its own; `settings`: of all channels."""
        self._broker = broker
        self._clock = clock
        self._hlm = hlm
        self._usual = {**NEW_MESSAGE, "hlm": hlm}
        self._settings = settings

    def posted(
        self, channel: str, body: bytes, type: str, given: Mapping[str, object], now: float
    ) -> dict[str, Any]:
        """The parameters of POST_MESSAGE."""
        _check_body(body, self._broker.max_message)
        own = {"channel": channel, "body": body, "type": type, "now": now, "due_at": now}
        message = {**self._usual, **own}
        settings = self._settings.get(channel)
        if given or settings:
            message.update(settings or {})
            message.update(parse_parameters(given, ALL_PARAMETERS))
            self._complete(message)
        return message

    def batch_item(self, channel: str) -> Callable[[BatchItem], dict[str, Any]]:
        """A function that makes the parameters of POST_MESSAGE of each message of a batch.

        Those to which none are given have the same, but for body and type.
        """
        now, max_message = self._clock.now(), self._broker.max_message
        usual: dict[str, Any] = {}

        def posted(item: BatchItem) -> dict[str, Any]:
            body, type, given = item
            if given or not usual:
                message = {**self.posted(channel, body, type, given, now), "batch": 1}
                if not given:
                    usual.update(message)
                return message
            _check_body(body, max_message)
            return {**usual, "body": body, "type": type}

        return posted

    def _complete(self, message: dict[str, Any]) -> None:
        """Adds what follows from the parameters of a message."""
        if message["delay"]:
            message["state"] = DELAYED
            message["due_at"] += message["delay"]
        if message["linger"]:
            validate_linger(message)
            message["expires_at"] = message["now"] + message["linger"]
        if message["dedup"] is not None:
            scope = f"channel {message['channel']}"
            message["scope"], message["dedup"] = _dedup(scope, message["dedup"])
            message["dedup_for"] = message["dedup-for"]

    def published(
        self, topic: str, body: bytes, type: str, given: Mapping[str, object]
    ) -> dict[str, Any]:
        """The parameters of PUBLISH_MESSAGE."""
        _check_body(body, self._broker.max_message)
        if given.get("unique") is not None:
            raise BadRequest("unique belongs to a channel, and cannot be given with a publication")
        keys = parse_parameters(given, SINGLE_PARAMETERS)
        scope, dedup = _dedup(f"topic {topic}", keys.get("dedup"))
        return {
            "topic": topic,
            "body": body,
            "type": type,
            "hlm": self._hlm,
            "now": self._clock.now(),
            "scope": scope,
            "dedup": dedup,
            "dedup_for": keys.get("dedup-for", DEFAULTS["dedup-for"]),
            "headers": keys.get("headers", ""),
            "group": keys.get("group", ""),
        }


class ForkedBroker:
    """A child's copy of a broker, which has no threads, and whose locks may be held forever."""

    def close(self) -> None:
        """Nothing: it is the parent's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unavailable(FORKED)


class Broker(Administration):
    """Channels, topics and messages over a `Store`; usable from any thread, without HTTP.

    A call returns when its effect is committed; the variants with `_async` return before, and call
    `on_done(operation)` once, in the committer thread: it must be short, and must not make calls
    that wait.  What is due is processed before an operation runs, so that limits hold at that
    moment.
    """

    def __init__(
        self,
        store: Transactions,
        hlm: int = 0,
        max_message: int = MAX_MESSAGE,
        clock: Clock = SYSTEM_CLOCK,
        max_channels: int = MAX_CHANNELS,
        metrics_channels: int = METRICS_CHANNELS,
    ) -> None:
        """`hlm`: messages that a channel may hold, 0 for any number; `max_message`: in bytes;
        `max_channels`: those with messages, subscriptions, settings or a pause, and also those
        for which consumers wait; `metrics_channels`: those with counters of their own."""
        record, max_age = store.join(lambda: self._clock.now_or_latest())
        self._clock = BrokerClock(clock, record, max_age)
        committer = Committer(store, self._clock.record)
        try:
            if not record:
                committer.run(Operation((TAKE_OVER_TIMES,), {"now": self._clock.now()}))
            channels = Channels(max_channels, committer.read, self._clock, store.is_shared)
            timers = Timers(self._on_tick, self._clock)
            state = State(committer, self._clock, channels, timers, EventCounts(metrics_channels))
            super().__init__(store, state, max_message)
            self._new = NewMessages(self, self._clock, hlm, channels.settings)
            self._watch = Watch(state, store.read) if store.is_shared else None
            self.schedules = Schedules(state, self._new_message)
            self.patterns = PatternSubscriptions(state, store)
            self.calls = Calls(state, self._new_message, store.read)
            self.retention = Retention(state, store, hlm, max_message)
            timers.schedule_rows([*store.read(NEXT_BY_CHANNEL)[0], (ALL, self.now())])
            self._submit_due()  # a backlog is left to the ticker, and delays no start
            committer.run(Operation())
            timers.start()
            if self._watch is not None:
                self._watch.start()
        except BaseException:
            committer.close()
            raise
        disown_in_children(self)

    def disown(self) -> None:
        """In a forked child: lets each call raise an error at once."""
        for owner in (self.schedules, self.patterns, self.calls, self.retention, self):
            object.__setattr__(owner, "__class__", ForkedBroker)

    def close(self) -> None:
        """Ends all waits and closes the store."""
        self._committer.check_thread()
        self.cancel_all()
        self._state.timers.join()
        if self._watch is not None:
            self._watch.join()
        record = self._clock.record(closing=True)
        if record is not None:
            with contextlib.suppress(LingerError):  # the database cannot be written, or is closed
                self._committer.run(record)
        self._committer.close()
        self._store.close()

    def _on_tick(self, is_due: bool) -> None:
        if is_due:
            self._state.waiting.forget_idle(self.now())
            self.process_due(TICK_INTERVAL / 2)  # of a backlog; the next tick follows at once
        record = self._clock.record(idle=True)
        if record is not None:
            self._committer.submit(record)
        self.schedules.post_due()
        self.retention.trim_due(TICK_INTERVAL / 2)
        for consumer in self._state.waiting.overdue(self._clock.source.monotonic()):
            self.cancel(consumer)
        self.statistics.sample()

    # -- producing

    def post(
        self, channel: str, body: bytes, type: str = DEFAULT_TYPE, **parameters: Unpack[PostFields]
    ) -> PostResult:
        """Adds a message to a channel.

        `parameters` are those of `MESSAGE_PARAMETERS` and `SINGLE_PARAMETERS`; for what is not
        given the channel's settings hold.  Raises `BadRequest` for an empty body, `TooLarge`, and
        `Full` at the channel's high-level mark.
        """
        check_parameters(parameters, ALL_PARAMETERS)
        message = self._new_message(channel, body, type, parameters)
        result: PostResult = self._committer.run(Post(self._state, message))
        return result

    def post_async(
        self,
        on_done: DoneCallback,
        channel: str,
        body: bytes,
        type: str = DEFAULT_TYPE,
        **parameters: object,
    ) -> None:
        """As `post`, for a caller that does not wait."""
        operation = Post(self._state, self._new_message(channel, body, type, parameters))
        operation.done_callback = on_done
        self._committer.submit(operation)

    def _new_message(
        self, channel: str, body: bytes, type: str, given: Mapping[str, object]
    ) -> dict[str, Any]:
        """The parameters of POST_MESSAGE, if there is room for a message."""
        self._store.check_space()
        name, now = check_name("channel", channel), self._clock.now()
        message = self._new.posted(name, body, type, given, now)
        self._state.channels.reserve(channel)
        if self._state.timers.next_due <= now:
            self._submit_pieces((channel,), now)
        return message

    def post_batch(self, channel: str, messages: Sequence[BatchItem]) -> list[int]:
        """Adds messages (body, type, parameters) to a channel in order, all or none; returns their
        ids.  A bad one raises its error with its `index`."""
        check_name("channel", channel)
        self._store.check_space()
        rows = _each(messages, self._new.batch_item(channel))
        self._state.channels.reserve(channel)
        ids: list[int] = self._run(PostBatch(self._state, rows), channel)
        return ids

    def publish(
        self, topic: str, body: bytes, type: str = DEFAULT_TYPE, **keys: Unpack[PublishKeys]
    ) -> tuple[dict[str, int], list[str], bool]:
        """Adds a copy of a message to each subscribed channel, in one transaction.

        `keys` are those of `PUBLISH_PARAMETERS`.  Returns the copies' ids by channel, the channels
        left out since they are at their high-level mark, and whether it was a duplicate.
        """
        return self.publication(topic, body, type, **keys)[:3]

    def publication(
        self, topic: str, body: bytes, type: str = DEFAULT_TYPE, **keys: Unpack[PublishKeys]
    ) -> Publication:
        """As `publish`; the result has also the `id` of a publication that is kept."""
        check_parameters(keys, SINGLE_PARAMETERS)
        (publication,) = self._publish(topic, [(body, type, keys)])
        return publication

    def publish_batch(
        self, topic: str, messages: Sequence[BatchItem]
    ) -> tuple[dict[str, list[int]], list[str], range]:
        """Publishes messages in order in one transaction; returns the ids of each channel's copies,
        the channels left out, and the ids of the publications that are kept."""
        ids: dict[str, list[int]] = {}
        full: set[str] = set()
        publications = self._publish(topic, messages)
        for publication in publications:
            full.update(publication.full)
            for channel, id in publication.ids.items():
                ids.setdefault(channel, []).append(id)
        return ids, sorted(full), kept_together(publications)

    def _publish(self, topic: str, messages: Sequence[BatchItem]) -> list[Publication]:
        check_name("topic", topic)
        self._store.check_space()
        rows = _each(messages, lambda m: self._new.published(topic, *m))
        if len(rows) > 1:
            self._check_copies(topic, rows)
        publications: list[Publication] = self._run(Publish(self._state, rows))
        return publications

    def _check_copies(self, topic: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """`TooLarge` if a batch of publications would become too much at once."""
        patterns = self._state.patterns.match_json(topic) or "[]"
        copies = len(self._read(MATCHING_CHANNELS, topic=topic, patterns=patterns)[0])
        size = sum(len(row["body"]) for row in rows)
        if copies * len(rows) > MAX_BATCH_COPIES or copies * size > MAX_BATCH_COPY_BYTES:
            raise TooLarge(
                f"copied to {copies} channels this batch would be more than {MAX_BATCH_COPIES}"
                f" messages or {MAX_BATCH_COPY_BYTES} bytes: publish fewer at once"
            )

    # -- consuming

    consumer = Consumer  # for one `take`

    def get(
        self,
        channel: str,
        wait: float = 0,
        timeout: Optional[int] = None,
        auto: bool = False,
        is_disconnected: Callable[[], bool] = bool,
    ) -> Optional[Message]:
        """Takes the next message of a channel; returns None if none comes in `wait` seconds.

        The other arguments are those of `consumer`.
        """
        messages = self.take(self.consumer([channel], 1, timeout, auto, is_disconnected), wait)
        return messages[0] if messages else None

    def take(
        self,
        consumer: Consumer,
        wait: float = 0,
        ack: Optional[int] = None,
        lease: Optional[int] = None,
        expected_channel: Optional[str] = None,
    ) -> list[Message]:
        """Takes messages for a consumer, which waits up to `wait` seconds; returns them.

        `ack`, with its `lease` and `expected_channel`, deletes that message in the same
        transaction; if that cannot be done nothing is taken, and it raises as `delete` does.
        """
        self._committer.check_thread()
        done: queue.SimpleQueue[Operation] = queue.SimpleQueue()
        try:
            self.take_async(done.put, consumer, wait, ack, lease, expected_channel)
            try:
                operation = done.get(timeout=wait) if wait > 0 else done.get()
            except queue.Empty:
                self.cancel(consumer)
                operation = done.get()
        except LingerError:  # the take was not submitted
            raise
        except BaseException:  # of a signal handler: nobody gets what was taken
            undone: queue.SimpleQueue[None] = queue.SimpleQueue()
            _thread.start_new_thread(self._undo_interrupted, (consumer, done, undone.put))
            undone.get()
            raise
        messages: list[Message] = operation.result()
        return messages

    def _undo_interrupted(
        self,
        consumer: Consumer,
        done: queue.SimpleQueue[Operation],
        on_undone: Callable[[None], None],
    ) -> None:
        """Ends a take whose caller was interrupted; in a thread that no signal interrupts."""
        try:
            self.cancel(consumer)
            with contextlib.suppress(LingerError):
                self._committer.run(Operation())  # when this is done, so is the take
            with contextlib.suppress(queue.Empty, LingerError):
                self.undo_take(consumer, done.get_nowait().result())
        finally:
            on_undone(None)

    def take_async(
        self,
        on_done: DoneCallback,
        consumer: Consumer,
        wait: float,
        ack: Optional[int] = None,
        lease: Optional[int] = None,
        expected_channel: Optional[str] = None,
    ) -> None:
        """As `take`, for a caller that does not wait.

        With `wait`, the consumer waits until it gets a message or is canceled, which the caller
        does after so many seconds.
        """
        consumer.on_done = on_done
        consumer.acknowledged, consumer.closed = False, wait <= 0
        if not consumer.closed:
            # Before anything is done; `add` checks again.
            self._state.waiting.check_room(consumer)
            consumer.deadline = self._clock.source.monotonic() + wait
        now = self._clock.now()
        if self._state.timers.next_due <= now:
            self._submit_pieces(consumer.channels, now)
        self._committer.submit(Take(self._state, consumer, now, ack, lease, expected_channel))

    def cancel(self, consumer: Consumer) -> None:
        """Ends a wait: the consumer gets no messages, unless it was just woken."""
        if self._state.waiting.cancel(consumer, self._clock.now_or_latest()):
            consumer.on_done(EndWait(consumer))

    def cancel_all(self) -> None:
        """Ends all waits and streams of events, now and from now on."""
        self._state.timers.stop()
        if self._watch is not None:
            self._watch.stop()
        self._store.hurry()
        self._state.waiting.close()
        self._state.live.close()
        for consumer in self._state.waiting.consumers():
            self.cancel(consumer)

    def undo_take(self, consumer: Consumer, messages: Sequence[Message]) -> None:
        """Puts back what could not be handed over; those deliveries are not counted."""
        if messages:
            self.undo_taken(consumer, list(map(TAKEN_OF, messages)))

    def undo_taken(self, consumer: Consumer, taken: Sequence[Taken]) -> None:
        """The same; the messages are not needed."""
        _, channel, _ = taken[0]
        self._run(UndoTake(self._state, consumer, taken, self.now()), channel)

    # -- acknowledging

    def touch(
        self,
        id: int,
        lease: Optional[int] = None,
        timeout: Optional[int] = None,
        expected_channel: Optional[str] = None,
    ) -> None:
        """Restarts the visibility timeout of a message in flight, from now.

        `timeout`: seconds for this delivery, in place of the message's own.  With `lease`, only
        if that delivery is the latest; with `expected_channel`, only if the message is in that
        channel.  `NotFound`, or `Conflict` when it is not in flight or the lease was lost.
        """
        parameters = self._parameters(id, expected_channel, lease=lease, timeout=timeout)
        self._run(Touch(self._state, parameters))

    def delete(
        self, id: int, lease: Optional[int] = None, expected_channel: Optional[str] = None
    ) -> None:
        """Deletes a message; `lease` and `expected_channel` as for `touch`."""
        self._run(Delete(self._state, id, lease, expected_channel, self.now()))

    def delete_async(
        self,
        on_done: DoneCallback,
        id: int,
        lease: Optional[int] = None,
        expected_channel: Optional[str] = None,
    ) -> None:
        """As `delete`, for a caller that does not wait."""
        now = self._clock.now()
        if self._state.timers.next_due <= now:
            self._submit_pieces((), now)
        operation = Delete(self._state, id, lease, expected_channel, now)
        operation.done_callback = on_done
        self._committer.submit(operation)

    def delete_batch(
        self,
        messages: Sequence[tuple[int, Optional[int]]],
        expected_channel: Mapping[int, Optional[str]] = types.MappingProxyType({}),
    ) -> tuple[list[int], list[int], list[int]]:
        """Deletes messages (id, lease or None); returns the ids deleted, in conflict and missing.

        `expected_channel` may name for an id the channel in which the message must be.
        """
        operation = DeleteBatch(self._state, dict(messages), expected_channel, self.now())
        outcome: tuple[list[int], list[int], list[int]] = self._run(operation)
        return outcome

    def release(
        self,
        id: int,
        lease: Optional[int] = None,
        delay: Optional[int] = None,
        reason: str = "",
        expected_channel: Optional[str] = None,
        uncounted: bool = False,
    ) -> None:
        """Gives a message in flight back: ready now, after `delay` seconds, or as its backoff says.

        The delivery stays counted, and if it was the last allowed one, it is a dead letter; but
        `uncounted`, with a lease, undoes it.  `reason` goes with the next.  Raises as `touch` does.
        """
        given = {"lease": lease, "delay": delay, "reason": _check_reason(reason)}
        parameters = self._parameters(id, expected_channel, **given)
        self._run(Release(self._state, parameters, uncounted))

    def reject(
        self,
        id: int,
        lease: Optional[int] = None,
        reason: str = "",
        expected_channel: Optional[str] = None,
    ) -> None:
        """Moves a message to its dead channel, or deletes it if it has none.

        With `lease`, only if that delivery is the latest and has not ended: raises as `touch`.
        """
        given = {"lease": lease, "reason": _check_reason(reason)}
        self._run(Reject(self._state, self._parameters(id, expected_channel, **given)))

    # -- changing messages

    def change(
        self, id: int, expected_channel: Optional[str] = None, **parameters: Unpack[MessageFields]
    ) -> None:
        """Changes a message that waits: those of CHANGE_PARAMETERS that are given.

        `delay`: seconds from now until it is ready.  `NotFound`, or `Conflict` while it is in
        flight, or if it would expire before it is ready or its deliveries are used up already.
        """
        check_parameters(parameters, CHANGE_PARAMETERS)
        given = parse_parameters(parameters, CHANGE_PARAMETERS)
        if not given:
            names = ", ".join(names_in(CHANGE_PARAMETERS))
            raise BadRequest(f"nothing is to be changed: give one or more of {names}")
        given = {**dict.fromkeys(names_in(CHANGE_PARAMETERS)), **given}
        self._run(ChangeMessage(self._state, self._parameters(id, expected_channel, **given)))

    def redrive_message(
        self, id: int, to: Optional[str] = None, expected_channel: Optional[str] = None
    ) -> None:
        """Moves a dead letter back to the channel that it came from, or any message that waits
        to the channel `to`, with its deliveries at 0.  Raises as `change`."""
        if to is not None:
            self._state.channels.reserve(check_name("channel", to))
        self._run(RedriveMessage(self._state, self._parameters(id, expected_channel, to=to)))

    def _parameters(
        self, id: int, expected_channel: Optional[str], **others: object
    ) -> dict[str, Any]:
        """The parameters of an operation on one message."""
        return {"id": id, "expected_channel": expected_channel, "now": self.now(), **others}


def _check_body(body: bytes, max_message: int) -> None:
    if not body:
        raise BadRequest("the message is empty: send 1 byte or more as the body, or as msg")
    if len(body) > max_message:
        raise TooLarge(f"the message has {len(body)} bytes, and at most {max_message} are taken")


def _check_reason(reason: str) -> str:
    if len(reason.encode()) > MAX_REASON:
        raise TooLarge(f"the reason may have at most {MAX_REASON} bytes")
    return reason


def _dedup(scope: str, key: Optional[str]) -> tuple[str, Optional[str]]:
    """The scope and key under which a dedup key is kept."""
    if isinstance(key, BatchKey):
        return f"batch {scope}", f"{key.position} {key}"
    return scope, key


def _each(items: Sequence[Any], convert: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Converts each item of a batch; the error of a bad one gets its index."""
    rows = []
    for index, item in enumerate(items):
        try:
            rows.append(convert(item))
        except LingerError as error:
            error.index = index
            raise
    return rows


# ---------------------------------------------------------------------------------------------
# Access: who may do what, and which web pages may send requests.  Knows a request by its headers
# and its client's address; nothing of sockets, paths or messages.
# ---------------------------------------------------------------------------------------------

READ, WRITE, ADMIN, METRICS_ONLY = "read", "write", "admin", "metrics"
RIGHTS = (READ, WRITE, ADMIN, METRICS_ONLY)  # admin includes metrics
OF_TOPICS = "topic:"  # before a token's pattern for topics
PUBLIC = ""  # the right that needs no token
AUTHENTICATED = "any token"  # the right that every token gives

BEARER_CHALLENGE = 'WWW-Authenticate: Bearer realm="Linger"\r\n'
CHALLENGE = f'{BEARER_CHALLENGE}WWW-Authenticate: Basic realm="Linger", charset="UTF-8"\r\n'
PREFLIGHT = (
    "Access-Control-Allow-Methods: GET, HEAD, POST, PUT, PATCH, DELETE\r\n"
    "Access-Control-Allow-Headers: Authorization, *\r\n"  # which * does not include
    f"Access-Control-Max-Age: {CORS_MAX_AGE}\r\n"
)
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
HOST_NAME = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]")
NUMERIC_END = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")  # a browser takes it for an address
SUBRESOURCE_TYPES = re.compile(  # at the start of Accept: only browsers ask for these
    r"(?:image|video|audio|font)/|application/(?:x-)?font|text/css|(?:text|application)/javascript",
    re.IGNORECASE,
)


class Grant(NamedTuple):
    """The rights of a token, and the channels and topics for which it has them."""

    rights: frozenset[str]
    channels: Optional[tuple[re.Pattern[str], ...]] = None  # None: all channels and all topics
    topics: Optional[tuple[re.Pattern[str], ...]] = None
    prefixes: tuple[re.Pattern[str], ...] = ()  # those of `topics` that end with *
    token_name: str = "-"  # of the token in the file, for the log

    def covers(self, kind: str, name: str) -> bool:
        """Whether it holds for one of the `channels` or `topics` (`kind`), or for all topics that
        match one of the `patterns`: they all begin with its literal prefix."""
        patterns = self.channels if kind == "channels" else self.topics
        prefix = literal_prefix(name) if kind == "patterns" else None
        if prefix is not None and patterns is not None:
            patterns, name = self.prefixes, prefix
        return patterns is None or any(pattern.match(name) for pattern in patterns)

    def visible(self, kind: str, names: Iterable[str]) -> list[str]:
        """Those of the `names` of channels or topics (`kind`) for which it holds."""
        return [name for name in names if self.covers(kind, name)]

    def check_name(self, kind: str, name: str) -> None:
        """`AccessDenied` if it does not hold for a name (`covers`), whether that exists or not."""
        if not self.covers(kind, name):
            raise AccessDenied(f"this name is not among the {kind} for which the token has rights")


NO_ACCESS = Grant(frozenset((PUBLIC,)), (), ())
FULL_ACCESS = Grant(frozenset((PUBLIC, AUTHENTICATED, *RIGHTS)))


def parse_token(text: str) -> bytes:
    """The SHA-256 of a token, which is written as it is or as `sha256:<hex>`."""
    kind, _, digest = text.partition(":")
    if kind == "sha256":
        if not re.fullmatch("[0-9a-fA-F]{64}", digest):
            raise BadRequest("sha256: must be followed by 64 hexadecimal digits")
        return bytes.fromhex(digest)
    if not re.fullmatch(f"[!-~]{{1,{MAX_TOKEN}}}", text):
        raise BadRequest(f"a token must be 1 to {MAX_TOKEN} visible ASCII characters")
    return hashlib.sha256(text.encode()).digest()


def parse_grant(rights: str, patterns: Sequence[str]) -> Grant:
    """The grant that the rights and patterns behind a token in a file stand for."""
    named = frozenset(rights.split(","))
    if not named.issubset(RIGHTS):
        raise BadRequest(f"the rights must be among {', '.join(RIGHTS)}, separated by commas")
    named |= {PUBLIC, AUTHENTICATED}
    if ADMIN in named:
        named |= {METRICS_ONLY}
    if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_NAME for pattern in patterns):
        raise BadRequest(f"the limit is {MAX_PATTERNS} patterns of {MAX_NAME} characters")
    if not patterns:
        return Grant(named)
    topics = [pattern[len(OF_TOPICS) :] for pattern in patterns if pattern.startswith(OF_TOPICS)]
    channels = [pattern for pattern in patterns if not pattern.startswith(OF_TOPICS)]
    prefixes = [topic for topic in topics if topic.endswith("*")]
    return Grant(named, _compile(channels), _compile(topics), _compile(prefixes))


def _compile(patterns: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(fnmatch.translate(pattern)) for pattern in patterns)


def load_tokens(path: str) -> dict[bytes, Grant]:
    """The grants in a file of tokens, by the SHA-256 of the token.

    A line is `name token rights [pattern ...]`; `#` starts a comment.  An error names the line,
    and nothing of its content.
    """
    try:
        with open(path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())  # a file of root's may be readable by its group
            if status.st_mode & (0o077 if status.st_uid == os.geteuid() else 0o007):
                log(f"linger: {path} is accessible to others than its owner: chmod 600 {path}")
            text = file.read(MAX_TOKENS_FILE + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadRequest(f"cannot read {path}: {reason}") from None
    if len(text) > MAX_TOKENS_FILE:
        raise BadRequest(f"{path} is too long: the limit is {MAX_TOKENS_FILE} characters")
    grants: dict[bytes, Grant] = {}
    names: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        try:
            _parse_token_line(re.sub(r"(^|\s)#.*", "", line).split(), grants, names)
        except BadRequest as error:
            raise BadRequest(f"{path}, line {number}: {error}") from None
    if not grants:
        raise BadRequest(f"{path} has no tokens, so nobody would have access")
    return grants


def _parse_token_line(words: Sequence[str], grants: dict[bytes, Grant], names: set[str]) -> None:
    if not words:
        return
    if len(words) < 3:
        raise BadRequest("it must be `name token rights [pattern ...]`")
    name, token, rights, *patterns = words
    digest = parse_token(token)
    if name in names or digest in grants:
        raise BadRequest("duplicate name or token")
    names.add(name)
    grants[digest] = parse_grant(rights, patterns)._replace(token_name=name)


def token_from_header(authorization: str) -> bytes:
    """The token in an Authorization header (RFC 6750 2.1, RFC 7617 2); empty if it has none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip(" ").encode("latin-1")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(value.strip(" "), validate=True).partition(b":")[2]
    return b""


def _parse_list(name: str, text: str, form: re.Pattern[str], meaning: str) -> frozenset[str]:
    items = [item.strip(" ").lower() for item in text.split(",")] if text else []
    if not all(form.fullmatch(item) for item in items):
        raise BadRequest(f"{name} must be {meaning}, separated by commas")
    return frozenset(items)


def load_certificate(cert: str, key: Optional[str]) -> ssl.SSLContext:
    """The TLS context of a server with this certificate; `BadRequest` if it cannot be used."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password="")  # do not ask for one on the terminal
    except (OSError, ValueError) as error:
        files = cert if key is None else f"{cert} and {key}"
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise BadRequest(f"cannot use the certificate in {files}: {reason}") from None
    return context


UNIX = "unix:"  # before the path of a Unix socket; before the user of a client that uses it
HTTP_UNIX = "http+unix"  # scheme of the URL of a server on a Unix socket


def client_key(address: str) -> str:
    """What counts as one client: an IPv4 address, the /64 network of an IPv6 address, or a user."""
    if address.startswith(UNIX):
        return address
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):  # one client usually has the whole /64
        return str(parsed.ipv4_mapped or parsed.packed[:8].hex())
    return address


class AuthThrottle:
    """Counts the wrong tokens of each client; after too many, it delays the responses to more.

    A right token is never delayed, even from the same address: many clients may share it.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards `_failures`
        self._failures: collections.OrderedDict[str, tuple[float, int]] = collections.OrderedDict()
        self.slots = threading.BoundedSemaphore(MAX_DELAYED_FAILURES)  # held during each delay

    def record_failure(self, address: str) -> float:
        """Counts a wrong token; returns the seconds by which to delay its response."""
        key = client_key(address)
        now = self._clock.monotonic()
        with self._lock:
            since, count = self._failures.pop(key, (now, 0))
            if now - since >= AUTH_FAILURE_WINDOW:
                since, count = now, 0
            self._failures[key] = since, count + 1
            if len(self._failures) > MAX_FAILING_ADDRESSES:
                self._failures.popitem(last=False)
        return AUTH_FAILURE_DELAY if count >= FREE_AUTH_FAILURES else 0.0


class Access:
    """The rules of access: tokens and their rights, web pages, names of this host, TLS.

    Any thread may call it.  `grants` (by the SHA-256 of the token) and `tls` are replaced as a
    whole by `reload`, so what was derived from a `grants` holds while that object is the same.
    """

    def __init__(
        self,
        token: Optional[str] = None,
        tokens: Optional[str] = None,
        no_auth: bool = False,
        cors: str = "",
        allow_host: str = "",
        cert: Optional[str] = None,
        key: Optional[str] = None,
        clock: Clock = time,
    ) -> None:
        """Takes the options of the command line, as in README.md; `BadRequest` for a bad one."""
        self._needs_token = token is not None or tokens is not None
        if no_auth and self._needs_token:
            raise BadRequest("no-auth gives everybody access, so it excludes tokens")
        if key is not None and cert is None:
            raise BadRequest("key needs cert")
        self._no_auth = no_auth
        self._token, self._tokens = token, tokens
        self._cert, self._key = cert, key
        self._origins = _parse_list("cors", cors, ORIGIN, "origins as https://a.example:8443, or *")
        self._hosts = _parse_list("allow-host", allow_host, HOST_NAME, "names without a port")
        self._listens_on_loopback = True
        self.throttle = AuthThrottle(clock)
        self.reload()

    def reload(self) -> None:
        """Reads the files of tokens and certificate; if one is invalid, nothing changes."""
        grants = {} if self._tokens is None else load_tokens(self._tokens)
        if self._token is not None:
            grants[parse_token(self._token)] = FULL_ACCESS
        self.tls = None if self._cert is None else load_certificate(self._cert, self._key)
        self.grants = grants

    def listen(self, address: str) -> None:
        """Notes the listening address; `BadRequest` if everybody would have access through it.

        On a loopback address, each request must have a Host of this machine: a web page can let
        a name of its own point here (DNS rebinding), and to the browser it is the same site then.
        The same holds for a Unix socket, behind a proxy.
        """
        is_unix = address.startswith(UNIX)
        self._listens_on_loopback = is_unix or ipaddress.ip_address(address).is_loopback
        if not (self._listens_on_loopback or self._needs_token or self._no_auth):
            raise BadRequest(
                f"listening on {address} would give everybody access: give tokens (--tokens FILE,"
                " or LINGER_TOKEN in the environment), or --no-auth if that is intended"
            )

    def identify(self, authorization: Optional[str]) -> Optional[Grant]:
        """The grant of the token in an Authorization header; None without a valid token.

        The look-up is by SHA-256.  A client cannot choose a hash that comes nearer to another
        token's step by step, so the time of the look-up reveals nothing.
        """
        if not self._needs_token:
            return FULL_ACCESS
        token = token_from_header(authorization or "")
        return self.grants.get(hashlib.sha256(token).digest()) if token else None

    def check_origin(self, headers: Mapping[str, str]) -> str:
        """The response's header lines for web pages; `AccessDenied` for a foreign page.

        This holds for every method, since a GET takes a message.  Clients that are not browsers
        send neither Origin nor Sec-Fetch-Site, and pass.
        """
        host = headers.get("host", "").lower()
        self.check_host(host)
        origin = headers.get("origin", "").lower()
        lines = "Vary: Origin\r\n" if self._origins and "*" not in self._origins else ""
        if origin and not self._origins.isdisjoint((origin, "*")):
            allowed = "*" if "*" in self._origins else headers["origin"]
            lines += f"Access-Control-Allow-Origin: {allowed}\r\n"
            lines += "Access-Control-Expose-Headers: *\r\n"
            return lines + (PREFLIGHT if "access-control-request-method" in headers else "")
        same = not origin or origin.endswith("://" + host)
        if headers.get("sec-fetch-site", "none" if same else "").lower() in ("none", "same-origin"):
            return lines
        raise AccessDenied("a web page of another site sent this: if it is yours, use --cors")

    def check_browser(self, headers: Mapping[str, str]) -> None:
        """`AccessDenied` if a browser sends this, and not for a page of this server.

        For requests that take or change something, in addition to `check_origin`.  To an address
        without TLS that is not loopback, browsers send neither Sec-Fetch-Site nor, with a GET for
        an <img> or <script>, Origin.  Then the Referer must be a page of this server.  A foreign
        page can suppress the Referer, so a request without one must not look like a browser's.
        """
        destination = headers.get("sec-fetch-dest", "").lower()
        if destination in ("", "empty", "document") and not SUBRESOURCE_TYPES.match(
            headers.get("accept", "")
        ):
            if headers.get("origin") or headers.get("sec-fetch-site"):
                return  # check_origin has accepted them
            referer = headers.get("referer", "").lower()
            if referer:
                authority = referer.partition("://")[2].partition("/")[0]
                if authority and authority == headers.get("host", "").lower():
                    return
            elif not ("accept-language" in headers and _is_browser(headers.get("user-agent", ""))):
                return
        raise AccessDenied(
            "a browser sent this for another page, or without saying for which one: only a program,"
            " or a page of this server, may take or change something"
        )

    def check_host(self, host: str) -> None:
        """`AccessDenied` unless a Host, if there is one, may be a name or address of this server.

        Addresses count only as browsers write them: what else a browser would take for an address
        is refused.  So are 0.0.0.0, :: and IPv4-mapped addresses, on any server: they lead to
        loopback, but browsers omit the headers by which a foreign page is recognized.
        """
        if not host:
            return
        name = re.sub(r":[0-9]*$", "", host.lower()).removesuffix(".")
        address: Union[ipaddress.IPv4Address, ipaddress.IPv6Address, None] = None
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        if address is not None and (
            address.is_unspecified
            or (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped)
            or (address.version == 4 and name != str(address))  # [127.0.0.1], 127.0.0.01
        ):
            raise AccessDenied(f"{name} is not the address of a server: use localhost")
        if name in self._hosts or name == "localhost" or name.endswith(".localhost"):
            return
        if self._listens_on_loopback and not (address is not None and address.is_loopback):
            raise AccessDenied(
                "the Host is neither localhost nor a loopback address: allow it with --allow-host"
            )
        if address is None and (self._hosts or "%" in name or NUMERIC_END.fullmatch(name)):
            raise AccessDenied(
                "the Host is neither localhost nor an address: allow it with --allow-host"
            )


def _is_browser(user_agent: str) -> bool:
    """Whether it begins as all browsers' do; PowerShell's does too, but names itself."""
    return user_agent.lower().startswith("mozilla/") and "powershell/" not in user_agent.lower()


# ---------------------------------------------------------------------------------------------
# Routes: every endpoint of the HTTP API.  Dispatch, 405 and its Allow header, and the check that
# README.md names all endpoints use this table.
# ---------------------------------------------------------------------------------------------

CONTENT = "content"  # a message or a reason; in a form of ours, its field msg
MANY = "many"  # messages or ids
PARAMETERS = "parameters"  # a form or a flat JSON object; of a GET, anything else is ignored


class Route(NamedTuple):
    """An endpoint of the API.

    The token must have its `right` for all channels and topics in the path.  An admin's endpoint
    without names in its path concerns the whole server.
    """

    method: str
    path: str
    endpoint: str  # the method of Api
    safe: bool  # whether it changes and takes nothing
    right: str
    summary: str
    body: str = PARAMETERS  # what the body of its requests is


# fmt: off
ROUTES = (
    Route("GET", "/", "server_info", True, AUTHENTICATED, "name and version of the server"),
    Route("GET", "/access", "get_access", True, AUTHENTICATED, "rights of the token"),
    Route("GET", "/health", "check_health", True, PUBLIC, "whether it can store a message now"),
    Route("GET", "/openapi.json", "describe_api", True, PUBLIC, "this description"),
    Route("GET", "/linger.py", "get_source", True, AUTHENTICATED, "the program that runs"),
    Route("GET", "/stats", "get_stats", True, ADMIN, "counters of the server"),
    Route("GET", "/stats/history", "get_history", True, ADMIN, "totals of the last hour"),
    Route("GET", "/metrics", "get_metrics", True, METRICS_ONLY, "figures for Prometheus"),
    Route("GET", "/backup", "open_backup", False, ADMIN, "a copy of the database"),
    Route("GET", "/channels", "list_channels", True, READ, "list channels"),
    Route("GET", "/channels/<channel>", "take_message", False, READ, "take messages"),
    Route("POST", "/channels/<channel>", "post_message", False, WRITE, "post a message", CONTENT),
    Route("DELETE", "/channels/<channel>", "drain_channel", False, ADMIN, "delete its messages"),
    Route("POST", "/channels/<channel>/batch", "post_batch", False, WRITE, "post many", MANY),
    Route("POST", "/channels/<channel>/call", "call", False, WRITE, "await the reply", CONTENT),
    Route("GET", "/channels/<channel>/drained", "await_end", True, READ, "wait until it is empty"),
    Route("GET", "/channels/<channel>/messages", "list_messages", True, READ, "list its messages"),
    Route("GET", "/channels/<channel>/stats", "get_channel_stats", True, READ, "its counts"),
    Route("GET", "/channels/<channel>/info", "get_info", True, READ, "its state in full"),
    Route("GET", "/channels/<channel>/live", "open_stream_channels", True, READ,
          "stream its events"),
    Route("GET", "/channels/<channel>/settings", "get_settings", True, READ, "show its settings"),
    Route("PUT", "/channels/<channel>/settings", "set_settings", False, ADMIN, "replace them"),
    Route("PATCH", "/channels/<channel>/settings", "change_settings", False, ADMIN, "change some"),
    Route("DELETE", "/channels/<channel>/settings", "clear_settings", False, ADMIN, "clear them"),
    Route("PUT", "/channels/<channel>/pause", "pause_channel", False, ADMIN, "stop deliveries"),
    Route("DELETE", "/channels/<channel>/pause", "resume_channel", False, ADMIN, "resume them"),
    Route("POST", "/channels/<channel>/redrive", "redrive", False, ADMIN, "move dead letters back"),
    Route("GET", "/channels/<channel>/topics", "list_channel_topics", True, READ, "its topics"),
    Route("PUT", "/channels/<channel>/topics/<topic>", "subscribe", False, ADMIN, "subscribe it"),
    Route("DELETE", "/channels/<channel>/topics/<topic>", "unsubscribe", False, ADMIN, "end that"),
    Route("GET", "/channels/<channel>/patterns", "list_channel_patterns", True, READ,
          "its patterns"),
    Route("PUT", "/channels/<channel>/patterns/<pattern>", "subscribe_pattern", False, ADMIN,
          "subscribe it to a pattern"),
    Route("DELETE", "/channels/<channel>/patterns/<pattern>", "unsubscribe_pattern", False, ADMIN,
          "end that"),
    Route("GET", "/topics/<topic>/settings", "get_topic_settings", True, READ, "what it keeps"),
    Route("PUT", "/topics/<topic>/settings", "set_topic_settings", False, ADMIN, "replace that"),
    Route("DELETE", "/topics/<topic>/settings", "clear_topic_settings", False, ADMIN, "keep none"),
    Route("GET", "/topics/<topic>/messages", "list_publications", True, READ, "list those kept"),
    Route("GET", "/patterns", "list_patterns", True, READ, "list patterns"),
    Route("GET", "/patterns/<pattern>/live", "open_stream", True, READ, "stream publications"),
    Route("GET", "/topics", "list_topics", True, READ, "list topics"),
    Route("POST", "/topics/<topic>", "publish_message", False, WRITE, "publish a message", CONTENT),
    Route("POST", "/topics/<topic>/batch", "publish_batch", False, WRITE, "publish many", MANY),
    Route("GET", "/topics/<topic>/channels", "list_subscribers", True, READ, "its channels"),
    Route("GET", "/topics/<topic>/live", "open_stream", True, READ, "stream its publications"),
    Route("GET", "/dead-letters", "list_dead_letters", True, ADMIN, "list those of all channels"),
    Route("GET", "/schedules", "list_schedules", True, READ, "list schedules"),
    Route("GET", "/schedules/<name>", "read_schedule", True, READ, "show a schedule"),
    Route("PUT", "/schedules/<name>", "put_schedule", False, ADMIN, "post at times", CONTENT),
    Route("DELETE", "/schedules/<name>", "delete_schedule", False, ADMIN, "delete a schedule"),
    Route("POST", "/schedules/<name>/run", "run_schedule", False, WRITE, "post its message now"),
    Route("GET", "/messages/<id>", "read_message", True, READ, "show a message"),
    Route("PATCH", "/messages/<id>", "change_message", False, WRITE, "change one that waits"),
    Route("DELETE", "/messages/<id>", "delete_message", False, READ, "delete a message"),
    Route("POST", "/messages/delete", "delete_messages", False, READ, "delete many messages", MANY),
    Route("POST", "/messages/<id>/reply", "reply", False, READ, "answer a call", CONTENT),
    Route("POST", "/messages/<id>/touch", "touch_message", False, READ, "restart its timeout"),
    Route("POST", "/messages/<id>/release", "release_message", False, READ, "return it", CONTENT),
    Route("POST", "/messages/<id>/reject", "reject_message", False, READ, "give it up", CONTENT),
    Route("POST", "/messages/<id>/redrive", "redrive_message", False, ADMIN, "move it back"),
)
# fmt: on


# The parameters of each endpoint that has any; the response names others as ignored.
PARAMETERS_OF: dict[str, Sequence[str]] = {
    "get_history": ("seconds",),
    "list_channels": ("info", "n", "after", "like", "order"),
    "take_message": ("wait", "nowait", "n", "timeout", "auto", "ack", "lease", "as"),
    "post_message": ("msg", "keep", *names_in(ALL_PARAMETERS)),
    "post_batch": ("keep", *names_in(ALL_PARAMETERS)),
    "call": ("msg", "keep", "wait", *names_in(CALL_PARAMETERS)),
    "await_end": ("wait",),
    "reply": ("msg", "lease"),
    "list_messages": ("state", "n", "after", "whole"),
    "set_settings": names_in(CHANNEL_PARAMETERS),
    "change_settings": names_in(CHANNEL_PARAMETERS),
    "list_dead_letters": ("n", "after", "reason", "order"),
    "pause_channel": ("for",),
    "redrive": ("n", "to"),
    "redrive_message": ("to",),
    "change_message": names_in(CHANGE_PARAMETERS),
    "subscribe": (*names_in(MESSAGE_PARAMETERS), "since"),
    "open_stream": ("since",),
    "set_topic_settings": names_in(RETENTION_PARAMETERS),
    "list_publications": ("since", "n", "whole"),
    "subscribe_pattern": names_in(MESSAGE_PARAMETERS),
    "publish_message": ("msg", "keep", *names_in(PUBLISH_PARAMETERS)),
    "publish_batch": ("keep", *names_in(PUBLISH_PARAMETERS)),
    "put_schedule": (
        *("msg", "keep", "channel", "cron", "tz", "every", "catch-up"),
        *names_in(SCHEDULE_PARAMETERS),
    ),
    "delete_message": ("lease",),
    "touch_message": ("lease", "timeout"),
    "release_message": ("msg", "lease", "delay", "uncounted"),
    "reject_message": ("msg", "lease"),
}
# Parameters of other endpoints that an endpoint refuses by name, in place of ignoring them.
REFUSED: dict[str, Sequence[str]] = {
    **dict.fromkeys(("set_settings", "change_settings", "subscribe"), names_in(SINGLE_PARAMETERS)),
    "subscribe_pattern": (*names_in(SINGLE_PARAMETERS), "since"),
    **dict.fromkeys(("publish_message", "publish_batch"), ("unique",)),
    "call": ("dedup", "dedup-for", "unique"),
    "open_stream_channels": ("since",),
}

KNOWN_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
METHODS = (*KNOWN_METHODS, "TRACE", "CONNECT")


def _path_pattern(segments: Sequence[str]) -> tuple[object, ...]:
    """What identifies a path with names in it: every second segment, and how many there are."""
    return (len(segments), *segments[::2])


def _index_routes() -> dict[tuple[object, ...], dict[str, Route]]:
    routes: dict[tuple[object, ...], dict[str, Route]] = {}
    for route in ROUTES:
        segments = route.path[1:].split("/")
        key = _path_pattern(segments) if "<" in route.path else tuple(segments)
        routes.setdefault(key, {})[route.method] = route
    return routes


ROUTES_BY_PATH = _index_routes()

# In place of server_info, where a client prefers HTML.
PAGE_ROUTES = {"GET": Route("GET", "/", "show_page", True, PUBLIC, "the dashboard")}


def routes_for(segments: Sequence[str]) -> dict[str, Route]:
    """The routes of a path by method; empty if there is no such path."""
    return ROUTES_BY_PATH.get(tuple(segments)) or ROUTES_BY_PATH.get(_path_pattern(segments), {})


def find_route(method: str, routes: Mapping[str, Route]) -> Route:
    """The route of a method among those of a path; `LingerError` 404, 405 or 501 without one."""
    route = routes.get("GET" if method == "HEAD" else method)
    if route is not None and (route.safe or method != "HEAD"):
        return route
    if method not in METHODS:
        raise LingerError(f"unknown method: use one of {', '.join(KNOWN_METHODS)}", 501)
    allowed = allowed_methods(routes)
    raise LingerError(f"this path allows {allowed}", 405, f"Allow: {allowed}\r\n")


def authorize(route: Route, kinds: Sequence[str], names: Sequence[str], grant: Grant) -> None:
    """`AccessDenied` if a token lacks the right to an endpoint with these names in its path."""
    if route.right not in grant.rights:
        raise AccessDenied(f"this token lacks the right `{route.right}`")
    server_wide = route.right in (ADMIN, METRICS_ONLY) and not names
    if server_wide and grant.channels is not None:
        raise AccessDenied("a token with patterns has no rights to the whole server")
    for kind, name in zip(kinds, names):
        if kind in ("channels", "topics", "patterns"):
            grant.check_name(kind, name)


def allowed_methods(routes: Mapping[str, Route]) -> str:
    """The methods of a path as in the Allow header (RFC 9110 10.2.1); `NotFound` without any."""
    if not routes:
        raise NotFound("there is no such path: see README.md for the endpoints of the API")
    head = ["HEAD"] if "GET" in routes and routes["GET"].safe else []
    return ", ".join([*routes, *head, "OPTIONS"])


# ---------------------------------------------------------------------------------------------
# Requests: from bytes to requests, without sockets.  Strict about what RFC 9112 calls strict, and
# bounded in bytes and lines.  After an error the connection is closed, so that no byte of a
# doubtful request is ever read as another one.
#
# The HTTP part is four sections, from here to Connections.  The steps of a request:
#   1. `Connection._read_request` receives bytes and feeds them to `RequestReader`.
#   2. The reader parses the head: `parse_head`.  Before it reads the body (`_read_body`, or
#      `_read_chunks` for a chunked one),
#   3. `Api.admit` checks Host and Origin (`Access.check_origin`), looks up the token
#      (`Access.identify`), and says how long the body may be.
#   4. `Api.find_endpoint` finds the endpoint and checks the token's rights (`authorize`).
#   5. The endpoint calls the broker and returns a `Response`; `Connection._send` sends it.
# A reply that waits for a commit is sent by another thread: see Connections.
# ---------------------------------------------------------------------------------------------

TCHAR = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rb"(" + TCHAR + rb") ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")
MESSAGE_HEAD = re.compile(  # a request line with a message's id in its path, or as its ack
    rb"[A-Z]+ (/(?:messages/(?=[0-9]+[/? ])|channels/[^?&= ]+\?(?:[^ ]*&)?ack=)([0-9]{1,18})"
    rb"(?![^&/? ])[!-~\x80-\xff]*) "
)
# One pass over all header lines: no control characters (RFC 9110 5.5), hence no bare CR or LF
# (RFC 9112 2.2), no folded lines (5.2), no space before the colon (5.1).
FIELD_LINES = re.compile(rb"(?:\r\n" + TCHAR + rb":[^\x00-\x08\x0a-\x1f\x7f]*)*")
AUTHORITY = re.compile(r"(?:[\w.~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?", re.ASCII)
EMPTY_LINES = re.compile(rb"(?:\r\n)+")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
ENCODED = re.compile(rb"(?:%[0-9A-Fa-f]{2})+")
BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
PART_NAME = re.compile(rb';[ \t]*name=(?:"([^"]*)"|([^\s;"]+))', re.IGNORECASE)
SINGLETON_HEADERS = frozenset(
    ("authorization", "content-length", "content-type", "host", "transfer-encoding")
)
UNCACHED_HEADERS = frozenset(("authorization", "idempotency-key"))  # secret, or new each time
FIELD_NAME = re.compile("[A-Za-z0-9_.-]+")  # of a parameter
FOREIGN_FIELD = re.compile(rb"(?:^|&)(?:[A-Za-z0-9_.%-]*[^A-Za-z0-9_.%&=-]|=)")  # no parameter
OFF = ("0", "false", "no", "off")  # values with which a switch is off
URLENCODED, MULTIPART = "application/x-www-form-urlencoded", "multipart/form-data"
JSON_TYPE = "application/json"


@functools.lru_cache(NAME_CACHE)
def decode_name(segment: str) -> str:
    """The text of a segment of a path, which is percent-encoded UTF-8."""
    if segment.isascii() and "%" not in segment:
        return segment
    if BAD_PERCENT.search(segment):
        raise BadRequest("a % in the path must be followed by two hexadecimal digits")
    try:
        return urllib.parse.unquote_to_bytes(segment.encode("latin-1")).decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("the path must be UTF-8, percent-encoded") from None


def _decode_percent(found: re.Match[bytes]) -> bytes:
    """The bytes of a percent-encoded piece.  urllib's way is slow when there are many lone %."""
    return bytes.fromhex(found[0].replace(b"%", b"").decode())


def parse_pairs(text: bytes) -> dict[str, bytes]:
    """The fields of a query string or an urlencoded form; the last of those with one name."""
    if text.count(b"&") >= MAX_PARAMETERS:
        raise BadRequest(f"the limit is {MAX_PARAMETERS} parameters")
    fields = {}
    for pair in text.split(b"&"):
        name, _, value = pair.replace(b"+", b" ").partition(b"=")
        if b"%" in pair:
            name, value = ENCODED.sub(_decode_percent, name), ENCODED.sub(_decode_percent, value)
        if name:
            fields[name.decode("utf-8", "replace")] = value
    return fields


def parse_form(body: bytes, content_type: str, required: str = "") -> Optional[dict[str, bytes]]:
    """The fields of a body that is a form of ours; None if it is another text.

    Many clients send every body as a form.  A form of ours has a `required` field, if one is
    named, and no field with a name that could not be one of a parameter.
    """
    if media_type(content_type) == MULTIPART:
        fields = parse_multipart(body, content_type)
    else:  # checked before it is split, since it may have any number of fields
        needed = b"(?:^|&)%s=" % required.encode() if required else b"="
        if not re.search(needed, body) or FOREIGN_FIELD.search(body):
            return None
        fields = parse_pairs(body)
    if not fields or not all(map(FIELD_NAME.fullmatch, fields)):
        return None
    return fields if not required or required in fields else None


def parse_multipart(body: bytes, content_type: str) -> Optional[dict[str, bytes]]:
    """The fields of a multipart/form-data body (RFC 7578, RFC 2046 5.1), files included; None if
    it is malformed, or has more than MAX_PARAMETERS parts."""
    found = re.search(r';[ \t]*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', content_type, re.I)
    if not found:
        return None
    boundary = (found[1] or found[2]).encode("latin-1")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARAMETERS + 1)
    if len(parts) < 2 or not parts[-1].startswith(b"--"):
        return None
    fields = {}
    for part in parts[1:-1]:
        head, separator, value = part.partition(b"\r\n\r\n")
        name = PART_NAME.search(head)
        if not separator or not name:
            return None
        fields[(name[1] or name[2] or b"").decode("utf-8", "replace")] = value
    return fields


# An array of numbers and of objects with nothing nested in them, once its strings are emptied.
# Checked before it is parsed: deep nesting makes the parser of Python 3.13 overflow the small
# stack of a thread.  A backslash outside a string misleads this check, but stops the parser.
JSON_STRING = re.compile('"[^"]*"')
LONG_NUMBER = re.compile("[0-9]{400}")  # Python 3.9 needs quadratic time for it
FLAT_ARRAY = re.compile(r"\s*\[[^{}\[\]]*(?:\{[^{}\[\]]*\}[^{}\[\]]*)*\]\s*")
FLAT_OBJECT = re.compile(r":\s*\{[^{}\[\]]*\}")  # as the value of a field


def is_flat(text: str, nested: bool = False) -> bool:
    """Whether a text, if it is JSON, is an array that can be parsed safely and quickly.

    `nested`: the fields of its objects may be flat objects.
    """
    bare = text.replace("\\\\", "").replace('\\"', "")
    if bare.count('"') > 4 * (MAX_JSON_COMMAS + MAX_BATCH):  # those of a field's name and value
        return False
    bare = JSON_STRING.sub('""', bare)
    if nested and len(bare) <= MAX_JSON_STRUCTURE:
        bare = FLAT_OBJECT.sub(":0", bare)
    if (
        len(bare) > MAX_JSON_STRUCTURE
        or bare.count("{") > MAX_BATCH
        or bare.count(",") > MAX_JSON_COMMAS
    ):
        return False
    return FLAT_ARRAY.fullmatch(bare) is not None and not LONG_NUMBER.search(bare)


def parse_flat_object(body: bytes) -> Optional[dict[str, bytes]]:
    """The fields of a flat JSON object, as a form has them; None if a body is anything else."""
    try:
        text = f"[{body.decode('utf-8')}]"
        items = json.loads(text) if is_flat(text) else []
    except ValueError:
        return None
    if len(items) != 1 or not isinstance(items[0], dict):
        return None
    given = ((name, value) for name, value in items[0].items() if value is not None)
    texts = ((n, v if isinstance(v, str) else json.dumps(v)) for n, v in given)
    return {name: text.encode("utf-8", "surrogatepass") for name, text in texts}


def media_type(content_type: str) -> str:
    """A Content-Type without its parameters, in lower case."""
    return content_type.partition(";")[0].strip(" \t").lower()


def prefers_html(accept: str) -> bool:
    """Whether an Accept header asks for HTML rather than JSON (RFC 9110 12.5.1)."""
    weights = {}
    for item in accept.lower().replace(" ", "").replace("\t", "").split(","):
        kind, *parameters = item.split(";")
        weight = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        weights[kind] = float(weight) if re.fullmatch(r"[01](?:\.[0-9]{0,3})?", weight) else 0
    json_kind = next((k for k in (JSON_TYPE, "application/*", "*/*") if k in weights), "")
    return weights.get("text/html", 0) > weights.get(json_kind, 0)


class Headers:
    """The header fields of a request, and how they say that it is to be read.

    Shared by all requests, also of other connections, that have the same header lines.
    """

    __slots__ = (
        "chunked", "close", "content_type", "cors_headers", "expects_continue", "fields", "is_form",
        "keep_alive", "length", "media_type", "own",
    )  # fmt: skip

    def __init__(self, fields: dict[str, str]) -> None:
        self.fields = fields  # by name in lower case; values of one name are joined with ", "
        options = fields.get("connection", "").lower().replace("\t", " ").split(",")
        names = [option.strip(" ") for option in options]
        self.close = "close" in names  # which wins (RFC 9112 9.3)
        self.keep_alive = "keep-alive" in names  # asked for by HTTP/1.0 only
        self.content_type = fields.get("content-type", "")
        self.media_type = media_type(self.content_type)
        self.is_form = self.media_type in (URLENCODED, MULTIPART)
        self.chunked = "transfer-encoding" in fields
        self.length = int(fields.get("content-length", 0))
        self.expects_continue = "expect" in fields
        self.own = [name for name in fields if name.startswith(OWN_HEADER)]
        self.cors_headers: Optional[str] = None  # the result of Access.check_origin, once it passed


def ignored_header(names: Sequence[str]) -> str:
    """The header lines that name parameters that were ignored: those that fit, and if they do
    not all, how many there are."""
    lines, room = "x-linger-ignored: ", MAX_IGNORED
    for name in names:
        encoded = urllib.parse.quote(name[:MAX_IGNORED], safe="", errors="replace")
        if len(encoded) >= room:
            return f"{lines.rstrip(',')}\r\nx-linger-ignored-count: {len(names)}\r\n"
        lines += encoded + ","
        room -= len(encoded) + 1
    return f"{lines.rstrip(',')}\r\n" if names else ""


NO_ROUTE = ("", "")  # method and path of a request to no route


class Request:
    """A request whose head has been read; the reader adds the body.

    A client sends the same head again and again, except for ids.  Its connection then uses the
    same `Request` again, with what was derived from its head.  It belongs to the connection's
    thread.  While a reply is pending the committer reads it too, and nobody changes it but for
    `release_body`, which the committer does not need.
    """

    __slots__ = (
        "_form", "_query_fields", "base_headers", "body", "body_kind", "body_limit", "close_after",
        "connection", "counted_as", "endpoint", "grant", "grants", "headers", "http10", "ignored",
        "is_plain", "known", "method", "names", "options", "query", "routes", "segments", "target",
    )  # fmt: skip

    def __init__(self, method: str, target: str, headers: Headers, http10: bool) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.http10 = http10
        # whether the response is the last (RFC 9112 9.3, C.2.2)
        self.close_after = headers.close or (http10 and not headers.keep_alive)
        path, _, self.query = target.partition("?")
        self.segments = path[1:].split("/")
        self.routes = routes_for(self.segments)  # of its path, by method
        route = self.routes.get("GET" if method == "HEAD" else method)
        self.counted_as = NO_ROUTE if route is None else (route.method, route.path)
        if path == "/" and prefers_html(headers.fields.get("accept", "")):
            self.routes = PAGE_ROUTES
        self.body = b""
        self._query_fields: Optional[dict[str, bytes]] = None
        self._form: Optional[dict[str, bytes]] = None
        self.connection: Any = None  # the Connection on which it came
        # Derived by Api when the head comes for the first time:
        self.grant = NO_ACCESS
        self.grants: object = None  # the Access.grants in which `grant` was found
        self.base_headers = ""  # header lines of every response to it
        self.body_limit = 0  # bytes
        self.body_kind = PARAMETERS  # Route.body
        self.is_plain = False  # whether it is a message without parameters, the usual POST
        self.endpoint: Optional[Callable[..., Any]] = None  # the method of Api
        self.names: Sequence[Any] = ()  # those in the path, or the id
        self.known: Sequence[str] = ()  # parameters of the endpoint
        self.ignored = ""  # header line with those given that are not
        self.options: Any = None  # what the endpoint has parsed from the query

    def retarget(self, target: str, id: str) -> None:
        """Takes another target, which differs only in a message's id, in path or query."""
        self.target = target
        if self.segments[0] == "messages":
            self.segments[1] = id
            self.names = [int(id)]
        else:
            self.query = target.partition("?")[2]
            self._query_fields = None

    def fields(self) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """The fields of the query, and those of the body."""
        query_fields = self._fields_of_query()
        if self._form is None and self.body:  # an empty chunked one says nothing about the next
            self._form = self._parse_body()
            if self._form:
                self.note_ignored(self._form)
        return query_fields, self._form or {}

    def _fields_of_query(self) -> dict[str, bytes]:
        if self._query_fields is None:
            self._query_fields = parse_pairs(self.query.encode("latin-1")) if self.query else {}
        return self._query_fields

    def _parse_body(self) -> dict[str, bytes]:
        if self.body_kind == MANY:
            return {}
        headers, form = self.headers, None
        if headers.is_form:
            required = "msg" if self.body_kind == CONTENT else ""
            form = parse_form(self.body, headers.content_type, required)
        if form is None and self.body_kind == PARAMETERS and self.method not in ("GET", "HEAD"):
            if headers.media_type == JSON_TYPE:
                form = parse_flat_object(self.body)
            if form is None:
                raise LingerError(
                    "this endpoint has parameters only: the body must be a form, or a flat object"
                    " as application/json",
                    415,
                )
        return form or {}

    def note_ignored(self, names: Iterable[str]) -> None:
        """Names those fields of the body that the endpoint does not know in the response."""
        unknown = [name for name in names if name not in self.known]
        if unknown:
            self.ignored = ignored_header([*self._unknown_in_query(), *unknown])
            self.endpoint = None  # `recognize` is called again for the next one with this head

    def recognize(self, known: Sequence[str], body_kind: str) -> None:
        """Takes the parameters that the endpoint knows; the response names others in the query."""
        self.known, self.body_kind = known, body_kind
        self.ignored = ignored_header(self._unknown_in_query()) if self.query else ""
        headers = self.headers
        has_parameters = headers.is_form or headers.own or "idempotency-key" in headers.fields
        self.is_plain = body_kind == CONTENT and not self.query and not has_parameters

    def _unknown_in_query(self) -> list[str]:
        with contextlib.suppress(BadRequest):  # too many: an endpoint that has any refuses them
            return [name for name in self._fields_of_query() if name not in self.known]
        return []

    def parameter(self, name: str) -> Optional[str]:
        """The text of a parameter; None if it is not given.  The body's wins over the query's."""
        if not self.query and not self.body:
            return None
        query, form = self.fields()
        value = form.get(name, query.get(name))
        if value is None:
            return None
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRequest(f"{name} must be UTF-8, percent-encoded") from None

    def switch(self, name: str) -> bool:
        """Whether a parameter is given, and not as 0, false, no or off."""
        value = self.parameter(name)
        return value is not None and value.lower() not in OFF

    def integer(
        self, name: str, minimum: int = MIN_INTEGER, maximum: int = MAX_INTEGER
    ) -> Optional[int]:
        """A parameter that is an integer; None if it is not given."""
        text = self.parameter(name)
        return None if text is None else parse_integer(name, text, minimum, maximum)

    def parameters(self, table: Sequence[Parameter]) -> dict[str, Any]:
        """The texts of those parameters of a table that are given."""
        if not any(self.fields()):
            return {}
        texts = ((p.name, self.parameter(p.name)) for p in table)
        return {name: text for name, text in texts if text is not None}

    def message_parameters(self, table: Sequence[Parameter]) -> dict[str, Any]:
        """The same for a message, whose `dedup` may also be in the header Idempotency-Key."""
        if self.is_plain:
            return {}
        values = self.parameters(table)
        key = self.headers.fields.get("idempotency-key")
        if key is not None:
            try:
                values.setdefault("dedup", key.encode("latin-1").decode("utf-8"))
            except UnicodeDecodeError:
                raise BadRequest("Idempotency-Key must be text in UTF-8") from None
        own = self._own_headers()
        if own:
            values["headers"] = own
        return values

    def _own_headers(self) -> dict[str, str]:
        """The headers that the message keeps: its own, and those that `keep` names."""
        fields = self.headers.fields
        kept = [name.strip(" ") for name in (self.parameter("keep") or "").lower().split(",")]
        if "authorization" in kept:
            raise BadRequest("keep cannot name Authorization: consumers would see the token")
        own = {name: fields[name] for name in kept if name in fields}
        own.update((name[len(OWN_HEADER) :], fields[name]) for name in self.headers.own)
        try:
            return {name: text.encode("latin-1").decode("utf-8") for name, text in own.items()}
        except UnicodeDecodeError:
            raise BadRequest("headers that a message keeps must be text in UTF-8") from None

    def header_room(self) -> int:
        """Bytes of the response's head that are left for headers of its own."""
        return MAX_RESPONSE_HEAD - COMMON_HEADERS - len(self.base_headers) - len(self.ignored)

    def release_body(self) -> None:
        """Frees the memory, since the request waits, or is used again."""
        self.body = b""
        self._form = None

    def reason(self) -> str:
        """The text that says why a message is released or rejected."""
        reason = self.fields()[1].get("msg", self.body)
        try:
            return reason.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRequest("the reason must be text in UTF-8") from None

    def message(self) -> tuple[bytes, str]:
        """The body and type of the message that is posted."""
        if not self.is_plain:
            query, form = self.fields()
            if form or not self.body:
                return (form or query).get("msg", b""), DEFAULT_TYPE
        content_type = self.headers.content_type or DEFAULT_TYPE
        if len(content_type) > MAX_TYPE:
            raise BadRequest(f"the Content-Type is too long: the limit is {MAX_TYPE} bytes")
        return self.body, content_type


def parse_head(head: bytes, cache: HeaderCache) -> Request:
    """The request that a head stands for, given without the empty line at its end."""
    line, _, _ = head.partition(b"\r\n")
    if len(line) > MAX_REQUEST_LINE:
        raise LingerError(f"the target is too long: the limit is {MAX_TARGET} bytes", 414)
    found = REQUEST_LINE.fullmatch(line)
    if not found:
        raise BadRequest("malformed request line: expected `METHOD /path HTTP/1.1`")
    method, target, major, minor = found.groups()
    if major != b"1":
        raise LingerError("this server speaks HTTP/1.1 and HTTP/1.0 only", 505)
    headers = cache.headers(head[len(line) :])
    http10 = minor == b"0"
    if http10 and headers.chunked:
        raise BadRequest("HTTP/1.0 has no Transfer-Encoding")
    if not http10 and "host" not in headers.fields:
        raise BadRequest("a request needs a Host header")
    host, path = parse_target(method, target.decode("latin-1"))
    if host:  # it replaces the Host header (RFC 9112 3.2.2)
        headers = Headers({**headers.fields, "host": host})
    return Request(method.decode("ascii"), path, headers, http10)


def parse_header_lines(lines: bytes) -> Headers:
    """The headers in lines that each begin with CR LF."""
    if len(lines) > MAX_HEAD or lines.count(b"\r\n") > MAX_FIELDS:
        raise LingerError(f"the limit is {MAX_FIELDS} headers of {MAX_HEAD} bytes in all", 431)
    if not FIELD_LINES.fullmatch(lines):
        raise BadRequest(
            "a header must be `Name: value` on one line, without control characters"
            " or a space before the colon"
        )
    fields: dict[str, str] = {}
    for line in lines.decode("latin-1").split("\r\n")[1:]:
        if len(line) > MAX_LINE:
            raise LingerError(f"a header line is too long: the limit is {MAX_LINE} bytes", 431)
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name not in fields:
            fields[name] = value
        elif name in SINGLETON_HEADERS:
            raise BadRequest(f"there may be only one {name} header")
        else:
            fields[name] += ", " + value
    if not AUTHORITY.fullmatch(fields.get("host", "localhost")):
        raise BadRequest("the Host header must be a name or address, optionally with a port")
    check_framing(fields)
    return Headers(fields)


def check_framing(fields: Mapping[str, str]) -> None:
    """Refuses what leaves in doubt where the request ends (RFC 9112 6.3), and unknown codings."""
    coding = fields.get("transfer-encoding")
    length = fields.get("content-length")
    if coding is not None:
        if length is not None:
            raise BadRequest("a request has either Transfer-Encoding or Content-Length")
        if coding.lower() != "chunked":
            status = 400 if "chunked" in coding.lower() else 501
            raise LingerError("the only transfer coding supported is chunked", status)
    elif length is not None:
        if not (length.isascii() and length.isdigit()):
            raise BadRequest("Content-Length must be a number of bytes in decimal digits")
        if len(length) > 15:
            raise TooLarge("the Content-Length is far beyond the limit")
    if fields.get("content-encoding", "identity").lower() != "identity":
        raise LingerError("send the body without Content-Encoding: bytes are kept as they are", 415)
    if fields.get("expect", "100-continue").lower() != "100-continue":
        raise LingerError("the only expectation supported is 100-continue", 417)


def parse_target(method: bytes, target: str) -> tuple[str, str]:
    """The host (empty if the target names none) and the path with its query (RFC 9112 3.2)."""
    if target.startswith("/") and "#" not in target:
        return "", target
    if target == "*" and method == b"OPTIONS":
        return "", target
    scheme, _, rest = target.partition("://")
    authority, slash, path = rest.partition("/")
    if "?" in authority:
        authority, _, query = rest.partition("?")
        slash, path = "/", "?" + query
    if scheme.lower() not in ("http", "https") or not AUTHORITY.fullmatch(authority) or "#" in path:
        raise BadRequest("the target must be a path that starts with /, or a URL with http://")
    return authority, (slash or "/") + path


class HeaderCache:
    """The meaning of header lines, for all connections: most clients send the same few.

    Without this and the next cache, a GET takes a third more CPU, a whole job a tenth.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards writing; a look-up in a dict needs none
        self._headers: dict[bytes, Headers] = {}

    def __len__(self) -> int:
        return len(self._headers)

    def headers(self, lines: bytes) -> Headers:
        """The headers in these lines, each of which begins with CR LF."""
        headers = self._headers.get(lines)
        if headers is None:
            headers = parse_header_lines(lines)
            is_fit = UNCACHED_HEADERS.isdisjoint(headers.fields) and not headers.own
            if is_fit and len(lines) <= MAX_CACHED_HEAD:
                with self._lock:
                    if len(self._headers) >= HEADER_CACHE:
                        self._headers.clear()
                    self._headers[lines] = headers
        return headers


class RequestCache(dict[bytes, Request]):
    """Recent requests of a connection by their heads, so that a head is parsed only once.

    `cache[head]` is the request for any head, which may be one that was returned before.  The key
    of a request that names a message is its head without the id, in a second dict.
    """

    __slots__ = ("_connection", "_header_cache", "_without_id")

    def __init__(self, header_cache: HeaderCache, connection: Any = None) -> None:
        self._header_cache = header_cache
        self._connection = connection
        self._without_id: dict[bytes, Request] = {}

    def __missing__(self, head: bytes) -> Request:
        cache: dict[bytes, Request] = self
        key, found = head, MESSAGE_HEAD.match(head)
        if found:
            start, end = found.span(2)
            cache, key = self._without_id, head[:start] + head[end:]
            if key in cache:
                request = cache[key]
                request.retarget(found[1].decode("latin-1"), found[2].decode("ascii"))
                return request
        request = parse_head(head, self._header_cache)
        request.connection = self._connection
        if len(head) <= MAX_CACHED_HEAD and (found or "ack=" not in request.query):
            if len(cache) >= REQUEST_CACHE:
                cache.clear()
            cache[key] = request
        return request

    def close(self) -> None:
        """Drops all requests and their connection, since it refers to them: nothing is to be left
        for the garbage collector."""
        self.clear()
        self._without_id.clear()
        self._connection = None


class RequestReader:
    """Turns the bytes of a connection into requests; knows no sockets.

    `feed` it what was received; `next_request` returns None when it needs more.  It raises a
    `LingerError` for a request that is malformed or too long, and is not to be used after that.
    `on_head` is called with each request whose head has been read, before its body is looked at;
    it returns how many bytes the body may have, or raises.  The methods that read a part of a
    request are generators, which yield whenever they need more bytes.
    """

    __slots__ = (
        "_cache", "_gathered", "_on_head", "_start", "_steps", "buffer", "expects_continue",
        "in_body", "received", "request", "wanted",
    )  # fmt: skip

    def __init__(self, cache: RequestCache, on_head: Callable[[Request], int]) -> None:
        self._cache = cache
        self._on_head = on_head
        self.buffer = b""  # received and not yet used, from `_start` on
        self._start = 0
        self._gathered: Optional[bytearray] = None  # collects a long piece in place of `buffer`
        # The parser of a request that has come only in part:
        self._steps: Optional[Generator[None, None, None]] = None
        self.request: Optional[Request] = None  # the one being read, once its head has been read
        self.received = 0  # bytes of that request
        self.in_body = False
        self.expects_continue = False  # whether its client waits for 100; the caller clears it
        self.wanted = RECEIVE_SIZE  # bytes that it makes sense to receive next

    def feed(self, data: bytes) -> None:
        """Adds bytes that were received."""
        self.received += len(data)
        if self._gathered is None:
            self.buffer += data
        else:
            self._gathered += data

    def discard(self) -> None:
        """Frees what was received; nothing is read after that."""
        self.buffer = b""
        self._gathered = self._steps = self.request = None

    def end(self) -> None:
        """Notes that no more bytes will come; `BadRequest` in the middle of a request."""
        if self.in_body:
            raise BadRequest("the request ended in its body")
        if self.buffer:
            raise BadRequest("the request ended in its head")

    def next_request(self) -> Optional[Request]:
        """The next request, complete with its body; None if more bytes are needed."""
        if self._steps is None:
            self.request = None
            head, separator, rest = self.buffer.partition(b"\r\n\r\n")
            if separator and head > b" " and len(head) <= MAX_REQUEST_HEAD:
                self.buffer = rest  # the head came in one piece, without an empty line before it
                request = self.request = self._cache[head]
                limit = self._on_head(request)
                length = request.headers.length
                if length:
                    if length <= limit and length <= len(rest):
                        request.body = rest[:length]
                        self.buffer = rest[length:]
                        return request
                elif not request.headers.chunked:
                    return request
                self._steps = self._read_body(request, limit)
            else:
                self._steps = self._read_in_pieces()
            self.received = len(head) + len(separator) + len(rest)
        try:
            next(self._steps)
        except StopIteration:
            self._steps = None
            return self.request
        return None

    def _read_in_pieces(self) -> Generator[None, None, None]:
        head = yield from self._read_head()
        request = self.request = self._cache[head]
        limit = self._on_head(request)
        if request.headers.length or request.headers.chunked:
            yield from self._read_body(request, limit)

    def _read_head(self) -> Generator[None, None, bytes]:
        """Reads a head that comes in several pieces, or after empty lines."""
        seen = 0
        while True:
            buffer = self.buffer
            if buffer.startswith(b"\r\n"):
                self.buffer = buffer = EMPTY_LINES.sub(b"", buffer, 1)  # RFC 9112 2.2
                seen = 0
            end = buffer.find(b"\r\n\r\n", max(seen - 3, 0))
            if 0 <= end <= MAX_REQUEST_HEAD:
                self.buffer = buffer[end + 4 :]
                return buffer[:end]
            self._check_partial_head(seen)
            seen = len(buffer)
            yield

    def _check_partial_head(self, seen: int) -> None:
        """Refuses a head that cannot become valid, as soon as that is certain.

        The first `seen` bytes are not searched again, since it may come byte by byte.
        """
        buffer = self.buffer
        if buffer.count(b"\n", seen) != buffer.count(b"\r\n", max(seen - 1, 0)):
            raise BadRequest("a line must end in CR LF")
        end = MAX_REQUEST_LINE + 2
        if len(buffer) >= end and buffer.find(b"\r\n", 0, end) < 0:
            raise LingerError(f"the target is too long: the limit is {MAX_TARGET} bytes", 414)
        if len(buffer) > MAX_REQUEST_HEAD + 3:
            raise LingerError(f"the headers are too long: the limit is {MAX_HEAD} bytes", 431)

    def _read_body(self, request: Request, limit: int) -> Generator[None, None, None]:
        """Reads the whole body, so that the next byte is the first of the next request."""
        headers = request.headers
        if headers.length > limit:
            raise TooLarge(f"the body has {headers.length} bytes; the limit is {limit}")
        self.in_body = True
        self.expects_continue = headers.expects_continue and not self.buffer and not request.http10
        if headers.length:
            yield from self._gather(headers.length)
            request.body = self.buffer[: headers.length]
            self._start = headers.length
        else:
            request.body = yield from self._read_chunks(limit)
        self.buffer = self.buffer[self._start :]
        self._start = 0
        self.in_body = False

    def _gather(self, size: int) -> Generator[None, None, None]:
        """Waits until the buffer has `size` bytes or more from its start on."""
        if len(self.buffer) - self._start >= size:
            return
        gathered = self._gathered = bytearray(self.buffer[self._start :])
        self.buffer = b""
        while len(gathered) < size:  # it grows in place, however small the pieces are
            self.wanted = min(size - len(gathered), MAX_RECEIVE_SIZE)  # nothing beyond it is kept
            yield
        self.buffer = bytes(gathered)
        self._start = 0
        self._gathered = None
        self.wanted = RECEIVE_SIZE

    def _read_line(self, limit: int) -> Generator[None, None, bytes]:
        """Reads a line of a chunked body."""
        while True:
            start = self._start
            end = self.buffer.find(b"\r\n", start)
            if (end if end >= 0 else len(self.buffer)) - start > limit:
                raise BadRequest(f"a line of a chunked body is too long: the limit is {limit}")
            if end >= 0:
                self._start = end + 2
                return self.buffer[start:end]
            self.buffer = self.buffer[start:]
            self._start = 0
            yield

    def _read_chunks(self, limit: int) -> Generator[None, None, bytes]:
        """Reads a chunked body (RFC 9112 7.1); ignores chunk extensions and trailers."""
        pieces: list[bytes] = []
        total = 0
        while len(pieces) < MAX_CHUNKS:
            line = yield from self._read_line(MAX_CHUNK_LINE)
            found = CHUNK_LINE.fullmatch(line)
            if not found:
                raise BadRequest("a chunk must start with its size in hexadecimal digits")
            size = int(found[1], 16)
            total += size
            if total > limit:
                raise TooLarge(f"the body is too long: the limit is {limit} bytes")
            if not size:
                yield from self._read_trailers()
                return b"".join(pieces)
            yield from self._gather(size + 2)
            end = self._start + size
            if self.buffer[end : end + 2] != b"\r\n":
                raise BadRequest("a chunk must end in CR LF after as many bytes as it announced")
            pieces.append(self.buffer[self._start : end])
            self._start = end + 2
        raise TooLarge(f"the body has too many chunks: the limit is {MAX_CHUNKS}")

    def _read_trailers(self) -> Generator[None, None, None]:
        trailer = b""
        while True:
            line = yield from self._read_line(MAX_LINE)
            if not line or len(trailer) > MAX_LINE:
                break
            trailer += b"\r\n" + line
        if line or not FIELD_LINES.fullmatch(trailer):
            raise BadRequest(f"trailers must be headers of at most {MAX_LINE} bytes in all")


# ---------------------------------------------------------------------------------------------
# Responses: messages, results and errors as header lines, JSON and bytes.
# ---------------------------------------------------------------------------------------------

TO_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
QUOTE = json.encoder.encode_basestring  # what it calls for a text
SHORT_ESCAPES = b'"\\\b\f\n\r\t'  # two characters in JSON, the other control characters six
ALL_ESCAPES = bytes(range(32)) + b'"\\'
NO_STORE = "Cache-Control: no-store\r\n"
SANDBOX = "Content-Security-Policy: sandbox\r\n"
PUBLICATION_HEADER = "x-linger-publication"  # an id, or for a batch the first and the last one
VARY = "Vary: Accept\r\n"
CLOSE = "Connection: close\r\n"
PLAIN_NAME = re.compile("[!-$&-~]*")  # visible ASCII without %
TYPE_IN_HEADER = re.compile(f"[\t -~\x80-\xff]{{1,{MAX_TYPE}}}")
FIRST_OPTIONAL = Message._fields.index("body") + 1  # fields from here on may be empty
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nServer: Linger/{__version__}\r\n"
    "X-Content-Type-Options: nosniff\r\n"
    for status in http.HTTPStatus
}


class JsonArray:
    """A JSON array of messages that is sent piece by piece.

    JSON can have six times the bytes of a body.  So a message with a long one is kept, and turned
    into JSON only when it is sent; the length, which a response says first, is calculated.
    """

    def __init__(self, items: Iterable[tuple[Any, ...]], to_json: Callable[..., str]) -> None:
        """`items`: a message each, and what else `to_json` is called with."""
        self._to_json = to_json
        self._parts: collections.deque[Any] = collections.deque()  # an item, or JSON of some
        self.length = 3  # brackets and newline; there is no comma before the first part
        self.size = 0  # bytes that are kept while it is sent
        texts: list[str] = []  # the JSON of the last items
        size = characters = longest = 0
        self._yielded = time.monotonic()
        for item in items:
            message = item[0]
            length = len(message.body)
            size += length + MESSAGE_BYTES
            if length <= UNCOUNTED:
                texts.append(to_json(*item))
                characters += len(texts[-1])
                if characters > SMALL_AMOUNT:
                    self._add_texts(texts)
                    characters = 0
            else:
                self._add_texts(texts)
                short = to_json(message._replace(body=b""), *item[1:])
                length = len(short.encode()) + json_length(message.body)
                self._add(item, length)
                longest = max(longest, length)
        self._add_texts(texts)
        self.size = size + longest + PIECE_BYTES

    def _add_texts(self, texts: list[str]) -> None:
        """Adds the JSON of items, and empties the list."""
        if texts:
            part = ",".join(texts).encode()
            texts.clear()
            self._add(part, len(part))

    def _add(self, part: Any, length: int) -> None:
        self._parts.append(part)
        self.length += length + (len(self._parts) > 1)
        if time.monotonic() > self._yielded + WORK_TIME:
            time.sleep(YIELD_TIME)
            self._yielded = time.monotonic()

    def pieces(self) -> Iterator[bytes]:
        """The array, in pieces of PIECE_BYTES or, of the longest messages, more; only once."""
        piece = bytearray(b"[")
        separator = b""
        while self._parts:
            part = self._parts.popleft()
            piece += separator
            piece += part if isinstance(part, bytes) else self._to_json(*part).encode()
            separator = b","
            if len(piece) >= PIECE_BYTES:
                data = bytes(piece)
                piece.clear()
                yield data
        yield bytes(piece) + b"]\n"


def json_length(body: bytes) -> int:
    """How many bytes longer than with an empty body a message is in JSON."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return (len(body) + 2) // 3 * 4 + len(',"encoding":"base64"')
    short = len(body) - len(body.translate(None, SHORT_ESCAPES))
    return len(body) + short + 5 * (len(body) - short - len(body.translate(None, ALL_ESCAPES)))


SSE, NDJSON = "text/event-stream", "application/x-ndjson"


def publication_object(publication: Message, cut: Optional[int]) -> dict[str, object]:
    """A publication as a JSON object, with an id if it is kept."""
    value: dict[str, object] = {"id": publication.id} if publication.id else {}
    value.update(topic=publication.topic, type=publication.type)
    if publication.header_lines:
        value["headers"] = publication.headers
    return {**value, **body_object(publication.body, cut)}


def event_json(event: Event) -> bytes:
    """An event as a JSON object: the message, and what happened to it."""
    message = event.message
    if not event.name:
        return TO_JSON(publication_object(message, event.cut)).encode()
    value: dict[str, object] = {"event": event.name}
    if event.source:
        value["from"] = event.source
    return TO_JSON({**value, **message_object(message, event.cut)}).encode()


class EventStream:
    """The events of a reader as the body of a response, as server-sent events
    (html.spec.whatwg.org/multipage/server-sent-events.html) or a line of JSON each.

    A comment or an empty line is a sign of life.  Something is sent at once, so that the client
    knows that it is connected.  With HTTP/1.1 the body is chunked, so that one that was broken off
    can be told from one that has ended.
    """

    def __init__(
        self,
        request: Request,
        reader: Union[Reader, Replay, None] = None,
        is_allowed: Callable[[], bool] = bool,
    ) -> None:
        """`reader`: None for a HEAD; `is_allowed()` is called before more is sent: when it says no,
        the stream ends."""
        self._reader = reader
        self._is_allowed = is_allowed
        self._is_ndjson = NDJSON in request.headers.fields.get("accept", "").lower()
        self.is_chunked = not request.http10
        self.type = NDJSON if self._is_ndjson else SSE

    def pieces(self) -> Iterator[bytes]:
        """The body, as the events happen; ends when the server stops."""
        assert self._reader is not None
        heartbeat = b"\n" if self._is_ndjson else b":\n\n"
        data = heartbeat if self._is_ndjson else b"retry: %d\n\n" % SSE_RETRY
        try:
            while self._is_allowed():
                yield self._frame(data)
                events = self._reader.events()
                if events is None:
                    break
                data = b"".join(map(self._encode, events)) or heartbeat
        except LingerError as error:  # of the database: the client is to connect again
            raise ConnectionAbortedError from error
        finally:
            self._reader.close()
        if self.is_chunked:
            yield b"0\r\n\r\n"

    def _encode(self, event: Event) -> bytes:
        data = event.data or event_json(event)
        if len(data) <= UNCOUNTED:
            event.data = data
        if self._is_ndjson:
            return data + b"\n"
        id = b"id: %d\n" % event.message.id if event.message.id and not event.name else b""
        return b"%sdata: %s\n\n" % (id, data)

    def _frame(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data) if self.is_chunked else data


# In place of a request that is malformed, or is not read.
NO_REQUEST = Request("-", "-", Headers({"connection": "close"}), http10=False)


@functools.lru_cache(1)
def date_line(now: int) -> str:
    """The Date header (RFC 9110 6.6.1), made once a second."""
    return f"Date: {email.utils.formatdate(now, usegmt=True)}\r\n"


class Response(NamedTuple):
    """A response, and `undo`, which is called if it cannot be sent."""

    status: int
    body: bytes = b""
    type: str = JSON_TYPE
    headers: str = ""  # lines, beside those that every response has
    undo: Optional[Callable[[], None]] = None
    file: Optional[BinaryIO] = None  # sent in place of the body, and closed
    array: Optional[JsonArray] = None  # sent in place of the body
    stream: Optional[EventStream] = None  # sent in place of the body, without an end

    def length(self) -> int:
        """The bytes of its body."""
        if self.file is not None:
            return os.fstat(self.file.fileno()).st_size
        return len(self.body) if self.array is None else self.array.length

    def reserved(self, request: Request, memory: Reservation) -> Response:
        """This response, once memory is reserved for it; an error if there is none, and the
        request has changed nothing.  The endpoint has reserved what an array needs."""
        size = FILE_CHUNK if self.file is not None else len(self.body)
        if self.array is not None or size <= UNCOUNTED:
            return self
        if request.method not in ("GET", "HEAD", "OPTIONS"):
            memory.force(size)
            return self
        try:
            memory.resize(size)
        except Unavailable as error:
            if self.undo is not None:
                self.undo()
            return error_response(error)
        return self

    def head(self, request: Request, connection: str) -> bytes:
        """Its status line and headers; `connection` is one of them."""
        body, content = self.body, ""
        if body:
            content = f"Content-Type: {self.type}\r\nContent-Length: {len(body)}\r\n"
        elif self.status not in (204, 304):  # which have no body (RFC 9110 8.6)
            content = self._content_lines()
        lines = (
            STATUS_LINES[self.status], date_line(int(time.time())), request.base_headers,
            request.ignored, self.headers, content, connection, "\r\n",
        )  # fmt: skip
        return "".join(lines).encode("latin-1")

    def _content_lines(self) -> str:
        stream = self.stream
        if stream is None:
            return f"Content-Type: {self.type}\r\nContent-Length: {self.length()}\r\n"
        chunked = "Transfer-Encoding: chunked\r\n" if stream.is_chunked else ""
        return f"Content-Type: {stream.type}\r\n{chunked}"

    def pieces(self, request: Request) -> Iterator[bytes]:
        """Its body, unless that is short: then it is sent with the head."""
        if not has_body(request):
            return
        if self.file is not None:
            while chunk := self.file.read(FILE_CHUNK):
                yield chunk
        elif self.array is not None:
            yield from self.array.pieces()
        elif self.stream is not None:
            yield from self.stream.pieces()
        elif len(self.body) > SMALL_AMOUNT:
            yield self.body


NO_CONTENT = Response(204)


def has_body(request: Request) -> bool:
    """Whether the response to a request has a body (RFC 9110 9.3.2)."""
    return request.method != "HEAD"


def json_response(value: object, status: int = 200, headers: str = "") -> Response:
    """A response in compact JSON that ends in a newline."""
    body = TO_JSON(value).encode("utf-8", "backslashreplace")  # \\udcff is also JSON
    return Response(status, body + b"\n", headers=headers)


def error_response(error: LingerError) -> Response:
    """The response for an error, the same for every endpoint."""
    headers = error.headers
    if error.status == 503:
        headers += f"Retry-After: {RETRY_AFTER}\r\n"
    value: dict[str, object] = {"error": str(error)}
    if error.index is not None:
        value["index"] = error.index
    return json_response(value, error.status, headers)


@functools.lru_cache(NAME_CACHE)
def encode_name(name: str) -> str:
    """A name as it may stand in a header: itself if it is visible ASCII without %, else
    percent-encoded, so that decoding is exact."""
    return name if PLAIN_NAME.fullmatch(name) else urllib.parse.quote(name, safe="")


def list_header(header: str, names: Sequence[str], room: int) -> str:
    """A header line with names; only their count, in `<header>-count`, if they do not fit.

    A comma in a name is encoded: it separates them.
    """
    if sum(map(len, names)) <= room:
        encoded = ",".join(encode_name(name).replace(",", "%2C") for name in names)
        line = f"{header}: {encoded}\r\n"
        if len(line) <= room:
            return line
    return f"{header}-count: {len(names)}\r\n"


def cut_encoded(text: str, size: int) -> str:
    """The percent-encoded beginning of a text, of at most `size` bytes and whole characters."""
    encoded = re.sub("%.?$", "", urllib.parse.quote(text[:size], safe="")[:size])
    whole = urllib.parse.unquote_to_bytes(encoded).decode("utf-8", "ignore")
    return urllib.parse.quote(whole, safe="")


@functools.lru_cache(NAME_CACHE)
def type_in_header(type: str) -> str:
    """The type of a message as it may stand in a header: one of Linger 1.0.1 had no limit."""
    return type if TYPE_IN_HEADER.fullmatch(type) else "application/octet-stream"


def message_headers(message: Message, request: Request, more: str = "") -> str:
    """All of a message but its body and type, as header lines that fit into the head of the
    response to a request, before `more` lines.

    A browser that shows the body must not run it as a page of this server, hence the sandbox.
    """
    headers = (
        f"{SANDBOX}"
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
    if any(message[FIRST_OPTIONAL:]):
        room = request.header_room() - len(headers) - len(more)
        headers += _optional_headers(message, room)
    return headers + more


def _optional_headers(message: Message, room: int) -> str:
    """The header lines of what most messages do not have."""
    fields: dict[str, object] = {
        "dead-from": encode_name(message.dead_from),
        "dead-reason": message.dead_reason,
        "dead-delivered": message.dead_delivered if message.dead_from else "",
        "error": cut_encoded(message.error, room),
        "backoff": message.backoff,
        "dead": encode_name(message.dead),
        "delay": message.delay or "",
        "unique": encode_name(message.unique),
        "hidden-for": message.hidden_for or "",
        "holder": encode_name(message.holder),
        "group": encode_name(message.group),
    }
    lines = {n: f"x-linger-{n}: {value}\r\n" for n, value in fields.items() if value != ""}
    if message.header_lines:
        own = message.header_lines.replace(REPLY_LINE, "")
        lines["h"] = own.encode().decode("latin-1")
        if message.reply_to:
            lines["h"] += f"x-linger-reply-to: {message.reply_to}\r\n"
    size = sum(map(len, lines.values()))
    if size > room or len(message.error) > room:
        _fit_lines(lines, message.error, room)
    return "".join(lines.values())


def _fit_lines(lines: dict[str, str], error: str, room: int) -> None:
    """Makes header lines fit: leaves out the longest and names them, then cuts the error.

    The own headers, `h`, are the last to go.
    """
    omitted: list[str] = []
    while True:
        lines["omitted"] = f"x-linger-omitted: {','.join(omitted)}\r\n" if omitted else ""
        left = room - sum(len(line) for name, line in lines.items() if name != "error")
        if left >= min(len(lines.get("error", "")), MIN_ERROR):
            break
        longest = max(lines.keys() - {"error", "omitted"}, key=lambda n: (n != "h", len(lines[n])))
        omitted.append(longest)
        del lines[longest]
    if len(lines.get("error", "")) > left:
        head, mark = "x-linger-error: ", "\r\nx-linger-error-cut: true\r\n"
        lines["error"] = head + cut_encoded(error, left - len(head + mark)) + mark


MESSAGE_KEYS = Message._fields[: FIRST_OPTIONAL - 1]
OPTIONAL_KEYS = tuple(name.replace("_", "-") for name in Message._fields[FIRST_OPTIONAL:])
HEADERS_KEY = "header-lines"  # in JSON they are an object, `headers`


def message_object(message: Message, cut: Optional[int] = None) -> dict[str, object]:
    """A message as a JSON object, with the first `cut` bytes of its body (None: all of it)."""
    value: dict[str, object] = dict(zip(MESSAGE_KEYS, message))
    value.update(body_object(message.body, cut))
    optional = zip(OPTIONAL_KEYS, message[FIRST_OPTIONAL:])
    value.update({name: field for name, field in optional if field and name != HEADERS_KEY})
    if message.headers:
        value["headers"] = message.headers
    if message.reply_to:
        value["reply-to"] = message.reply_to
    if message.dead_from:
        value["dead-delivered"] = message.dead_delivered  # also 0
    return value


PLAIN_JSON = "{" + "".join(f'"{key}":%s,' for key in MESSAGE_KEYS) + '"body":%s}'


def message_json(message: Message) -> str:
    """A `message_object` in JSON; without optional fields it takes a fifth of the time."""
    if any(message[FIRST_OPTIONAL:]):
        return TO_JSON(message_object(message))
    try:
        text = QUOTE(message.body.decode("utf-8"))
    except UnicodeDecodeError:
        return TO_JSON(message_object(message))
    plain: Any = message[: FIRST_OPTIONAL - 1]
    id, channel, *numbers, topic, lease, type = plain
    return PLAIN_JSON % (id, QUOTE(channel), *numbers, QUOTE(topic), lease, QUOTE(type), text)


def listed_object(message: Message, state: str, cut: Optional[int]) -> dict[str, object]:
    """A message of a listing, with the first `cut` bytes of its body (None: all of it)."""
    return {**message_object(message, cut), "state": state}


def schedule_object(
    schedule: Schedule, left: float, next_due: float, cut: Optional[int]
) -> dict[str, object]:
    """A schedule, which is due in `left` seconds, with the first `cut` bytes of its body.  Moments
    are in its time zone (ISO 8601)."""
    zone: datetime.tzinfo = datetime.timezone.utc
    with contextlib.suppress(BadRequest):  # its data is gone
        zone = find_zone(schedule.tz)
    due, last = (
        None if t is None else datetime.datetime.fromtimestamp(t, zone).isoformat("T", "seconds")
        for t in (next_due, schedule.last_at)
    )
    return {
        "name": schedule.name,
        "channel": schedule.channel,
        **({"cron": schedule.cron, "tz": schedule.tz} if schedule.cron else {}),
        **({"every": schedule.every} if schedule.every else {}),
        "catch-up": bool(schedule.catch_up),
        "next": due,
        "next-in": math.ceil(left),
        "last": last,
        "last-id": schedule.last_id,
        "last-error": schedule.last_error or None,
        **json.loads(schedule.parameters),
        "type": schedule.type,
        **body_object(schedule.body, cut),
    }


def body_object(body: bytes, cut: Optional[int] = None) -> dict[str, object]:
    """A body in JSON: text, or base64 where it is not UTF-8.

    If it has more than `cut` bytes, only so many, but no part of a character.
    """
    is_cut = cut is not None and len(body) > cut
    value: dict[str, object] = {"cut": True} if is_cut else {}
    kept = body[:cut]
    try:
        if is_cut:
            value["body"] = codecs.getincrementaldecoder("utf-8")().decode(kept)
        else:
            value["body"] = kept.decode("utf-8")
    except UnicodeDecodeError:
        value.update(body=base64.b64encode(kept).decode("ascii"), encoding="base64")
    return value


# ---------------------------------------------------------------------------------------------
# Metrics: the page for Prometheus (prometheus.io/docs/instrumenting/exposition_formats).  It is
# built in the thread of the connection that asks, from the table METRICS.
# ---------------------------------------------------------------------------------------------

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[str, float]  # the rest of the name with its labels, and the value
LABEL_ESCAPES = {ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n"}
# By method and path of the route, and status
Answered = collections.Counter[tuple[tuple[str, str], int]]


class RequestCounts:
    """How many requests were answered, by route and status; for any thread.

    Each connection counts its own without a lock: its requests are answered one after the other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards both
        self._ended: Answered = collections.Counter()  # on connections that are closed
        self._open: dict[int, Answered] = {}

    def begin(self) -> Answered:
        """The counts of a new connection."""
        counts: Answered = collections.Counter()
        with self._lock:
            self._open[id(counts)] = counts
        return counts

    def end(self, counts: Answered) -> None:
        """Keeps the counts of a connection that is closed."""
        with self._lock:
            del self._open[id(counts)]
            self._ended.update(counts)

    def samples(self) -> Iterator[Sample]:
        """The counts, labeled with route and status."""
        with self._lock:
            total = self._ended.copy()
            for counts in self._open.values():
                total.update(counts.copy())
        for ((method, path), status), count in sorted(total.items()):
            yield labels(method=method, route=path, status=str(status)), count


def labels(**values: str) -> str:
    """Labels as they stand behind a name."""
    escaped = ((name, text.translate(LABEL_ESCAPES)) for name, text in values.items())
    return "{" + ",".join(f'{name}="{text}"' for name, text in escaped) + "}"


class Snapshot:
    """What a page shows, as far as several metrics share it."""

    def __init__(self, server: Server) -> None:
        broker = server.broker
        self.channels = broker.statistics.channels()
        self.events = broker.statistics.events()
        self.histograms = broker.statistics.histograms()
        self.requests: RequestCounts = server.requests
        self.labels = {channel: labels(channel=channel) for channel in self.channels}
        schedules, failed, kept = broker.statistics.schedules_and_kept()
        self.kept: dict[str, int] = kept
        self.single: dict[str, float] = {
            "linger_publications_total": broker.counters["publications"],
            "linger_schedules": schedules,
            "linger_schedules_failed": failed,
            "linger_connections": len(server.connections),
            "linger_connections_limit": server.max_connections,
            "process_start_time_seconds": broker.start,
            **broker.statistics.disk_usage(),
            **process_usage(),
        }

    def column(self, column: int) -> Iterator[Sample]:
        """A column of ChannelMetrics."""
        return ((self.labels[channel], row[column]) for channel, row in self.channels.items())

    def messages(self) -> Iterator[Sample]:
        """The messages of each channel and state."""
        for channel, row in self.channels.items():
            for state, count in zip(("ready", "in_flight", "delayed", "blocked"), row):
                yield f'{self.labels[channel][:-1]},state="{state}"}}', count

    def event(self, event: str) -> Iterator[Sample]:
        """How often one of EVENTS has happened in each channel."""
        for channel, counts in self.events.items():
            yield self.labels.get(channel) or labels(channel=channel), counts[event]

    def histogram(self, name: str) -> Iterator[Sample]:
        """The buckets, which are cumulative, the sum and the count."""
        histogram = self.histograms[name]
        histogram.fold()
        totals = list(itertools.accumulate(histogram.counts))
        for bound, total in zip((*histogram.bounds, "+Inf"), totals):
            yield f'_bucket{{le="{bound}"}}', total
        yield "_sum", histogram.sum
        yield "_count", totals[-1]

    def value(self, name: str) -> Iterator[Sample]:
        """A single value, if it is known here."""
        if name in self.single:
            yield "", self.single[name]

    def versions(self) -> Iterator[Sample]:
        """A sample for the program."""
        python, sqlite = sys.version.split()[0], sqlite3.sqlite_version
        yield labels(version=__version__, python=python, sqlite=sqlite), 1


class Metric(NamedTuple):
    """A metric of the page."""

    name: str
    kind: str
    help: str
    samples: Callable[[Snapshot], Iterable[Sample]]


def _value(name: str, help: str, kind: str = "gauge") -> Metric:
    return Metric(name, kind, help, lambda snapshot: snapshot.value(name))


def _histogram(name: str, help: str) -> Metric:
    return Metric(name, "histogram", help, lambda snapshot: snapshot.histogram(name))


def _event(event: str, help: str) -> Metric:
    return Metric(f"linger_messages_{event}_total", "counter", help, lambda s: s.event(event))


# fmt: off
METRICS = (
    Metric("linger_build_info", "gauge", "The versions in use; always 1.", Snapshot.versions),
    Metric("linger_messages", "gauge", "Messages stored.", Snapshot.messages),
    Metric("linger_oldest_ready_seconds", "gauge",
           "Time since the oldest ready message was posted, 0 without one.", lambda s: s.column(4)),
    Metric("linger_waiting_consumers", "gauge", "Consumers that wait.", lambda s: s.column(5)),
    *itertools.starmap(_event, EVENTS.items()),
    _value("linger_publications_total", "Messages published, without their copies.", "counter"),
    Metric("linger_kept_publications", "gauge", "Publications that a topic keeps.",
           lambda s: ((labels(topic=topic), count) for topic, count in s.kept.items())),
    _value("linger_schedules", "Schedules."),
    _value("linger_schedules_failed", "Schedules whose last message could not be posted."),
    _histogram("linger_queue_time_seconds", "Time that a message was ready until its delivery."),
    _histogram("linger_flight_time_seconds", "Time from a message's last delivery to its delete."),
    _histogram("linger_commit_seconds", "Time of a transaction with its sync."),
    _histogram("linger_commit_operations", "Operations that a transaction had."),
    Metric("linger_http_requests_total", "counter", "Requests answered.",
           lambda s: s.requests.samples()),
    _value("linger_connections", "Open connections."),
    _value("linger_connections_limit", "Connections that may be open."),
    _value("linger_database_bytes", "Size of the database file."),
    _value("linger_log_bytes", "Size of its write-ahead log."),
    _value("linger_disk_free_bytes", "Free space on the disk of the database."),
    _value("process_cpu_seconds_total", "CPU time used.", "counter"),
    _value("process_start_time_seconds", "Start of the process, in Unix time."),
    _value("process_resident_memory_bytes", "Resident memory."),
    _value("process_virtual_memory_bytes", "Virtual memory."),
    _value("process_open_fds", "Open file descriptors."),
    _value("process_max_fds", "File descriptors that may be open."),
)
# fmt: on


def process_usage() -> dict[str, float]:
    """What the process uses, by name in METRICS; on other systems than Linux less of it."""
    times = os.times()
    usage: dict[str, float] = {
        "process_cpu_seconds_total": round(times.user + times.system, 2),
        "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        pages = [int(number) for number in file.read().split()]
        usage["process_virtual_memory_bytes"] = pages[0] * resource.getpagesize()
        usage["process_resident_memory_bytes"] = pages[1] * resource.getpagesize()
        usage["process_open_fds"] = len(os.listdir("/proc/self/fd"))
    return usage


def metrics_page(server: Server) -> bytes:
    """The whole page.  It pauses between metrics, so that other threads get the interpreter."""
    snapshot = Snapshot(server)
    parts = []
    for name, kind, help, samples in METRICS:
        lines = [f"{name}{rest} {value}\n" for rest, value in samples(snapshot)]
        if lines:
            head = f"# HELP {name} {help}\n# TYPE {name} {kind}\n"
            parts.append("".join((head, *lines)).encode())
        time.sleep(YIELD_TIME)
    return b"".join(parts)


# ---------------------------------------------------------------------------------------------
# Page style: how the dashboard looks, in light and dark and on a phone.
# ---------------------------------------------------------------------------------------------

PAGE_STYLE = r"""
:root {
    --back: #f6f7f9; --card: #ffffff; --line: #e2e5ea; --strong-line: #868e9c;
    --text: #1a1e26; --muted: #59616e; --accent: #1f56c9; --on-accent: #ffffff;
    --hover: #eef2fb; --good: #1a7f4b; --bad: #b3261e; --warn: #8a5a00; --bad-back: #fdeceb;
    --blue: #2f6fe0; --green: #1d9a6c; --violet: #8b5cd6; --red: #d64545;
}
@media (prefers-color-scheme: dark) {
    :root {
        --back: #0f1217; --card: #171b22; --line: #2a303a; --strong-line: #6b7483;
        --text: #e7eaef; --muted: #9ba5b4; --accent: #84adff; --on-accent: #0d1526;
        --hover: #1e2530; --good: #4cc38a; --bad: #ff8a80; --warn: #e5b454; --bad-back: #3a1d1d;
        --blue: #6aa1ff; --green: #45c497; --violet: #b391f5; --red: #ff7b72;
    }
}
* {
    box-sizing: border-box; scrollbar-width: thin;
    scrollbar-color: var(--strong-line) transparent;
}
[hidden] { display: none !important; }
html { color-scheme: light dark; scrollbar-gutter: stable; }
body {
    margin: 0; background: var(--back); color: var(--text);
    font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
    font-variant-numeric: tabular-nums;
}
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
main:focus { outline: none; }
h1 { font-size: 1.4rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; font-weight: 600; margin: 0; }
pre, .mono { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
th, dt, summary, small, ::placeholder, .server, .crumbs, .zero, .none, .pages, .mark, .legend,
.hint, .bar nav a, .tabs button { color: var(--muted); }

.bar, .bar .server, .brand, .head, .actions, .card > header, .pages {
    display: flex; align-items: center; gap: 8px;
}
.bar, .head, .actions, .card > header { flex-wrap: wrap; }
.bar {
    gap: 4px 24px; padding: 10px 24px; min-height: 55px; background: var(--card);
    border-bottom: 1px solid var(--line);
}
.brand { font-weight: 650; color: var(--text); }
.brand svg { width: 22px; height: 22px; color: var(--accent); }
.bar nav { display: flex; gap: 4px; }
.bar nav a { padding: 6px 12px; border-radius: 6px; }
.bar nav a:hover { text-decoration: none; }
.bar nav [aria-current="page"], .tabs [aria-pressed="true"] {
    color: var(--text); background: var(--hover); font-weight: 600;
}
.bar .server { gap: 16px; }
.server, .head .actions, header .actions { margin-left: auto; }
.light::before {
    content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%;
    margin-right: 7px; background: var(--strong-line);
}
.light.good::before { background: var(--good); }
.light.bad::before { background: var(--bad); }
main { max-width: 1240px; margin: 0 auto; padding: 20px 24px 64px; }
.alert {
    background: var(--bad-back); color: var(--bad); padding: 10px 24px;
    border-bottom: 1px solid var(--bad);
}
.stale main { opacity: 0.6; }

.head { gap: 10px 12px; margin-bottom: 16px; }
.actions:empty { display: none; }
.crumbs { margin-bottom: 2px; }
.card {
    background: var(--card); border: 1px solid var(--line); border-radius: 10px;
    margin: 0 0 20px; min-width: 0;
}
.card > header { gap: 8px 16px; padding: 12px 16px; }
.inside { padding: 4px 16px 16px; }
.inside ul { margin: 0; padding-left: 18px; }
.inside .actions { margin-top: 12px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 0 20px; }

.facts {
    display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); overflow: hidden;
}
.facts div { padding: 10px 16px; box-shadow: -1px -1px 0 var(--line); }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; white-space: nowrap; }
.list { display: grid; grid-template-columns: max-content 1fr; gap: 6px 24px; margin: 0; }
.list dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }

.scroll { overflow-x: auto; }
.live .scroll { max-height: 40vh; }
table { border-collapse: collapse; width: 100%; }
th, td {
    padding: 8px 16px; text-align: left; white-space: nowrap; vertical-align: middle;
    border-bottom: 1px solid var(--line);
}
th, .facts dt, .legend, .tip, button.small { font-size: 13px; }
th { font-weight: 500; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
th.action { font-size: 0; }
.wide { width: 100%; max-width: 0; overflow: hidden; text-overflow: ellipsis; }
.tick { width: 1px; padding-right: 0; }
th button { color: inherit; background: none; border: 0; padding: 0; }
[aria-sort$="ending"] { color: var(--text); font-weight: 600; }
[aria-sort="ascending"] button::after { content: " ↑"; }
[aria-sort="descending"] button::after { content: " ↓"; }
.none { padding: 28px 16px; text-align: center; }
.pages { padding: 10px 16px; }
.pages span { margin-right: auto; }
.mark {
    display: inline-block; font-size: 12px; padding: 1px 8px; border-radius: 9px; font-weight: 400;
    border: 1px solid var(--strong-line); max-width: 16em; overflow: hidden;
    text-overflow: ellipsis; vertical-align: bottom;
}
.mark.warn { border-color: var(--warn); color: var(--warn); }

button, input, select, textarea {
    font: inherit; color: inherit; border-radius: 6px; padding: 6px 10px;
    background: var(--card); border: 1px solid var(--strong-line);
}
button { padding: 5px 13px; cursor: pointer; white-space: nowrap; }
button:hover, .bar nav a:hover, tbody tr:hover { background: var(--hover); }
button:disabled { opacity: 0.5; cursor: default; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
button.main:hover { filter: brightness(1.1); }
button.danger { border-color: var(--bad); color: var(--bad); }
button.small { padding: 2px 10px; }
input, textarea { width: 100%; }
input[type="checkbox"] { width: auto; accent-color: var(--accent); vertical-align: middle; }
input[type="search"] { width: 220px; max-width: 100%; }
::placeholder { opacity: 1; }
.tabs { display: flex; flex-wrap: wrap; gap: 4px; }
.tabs button { border-color: transparent; }
.tabs button::first-letter { text-transform: uppercase; }

dialog {
    border: 1px solid var(--line); border-radius: 12px; padding: 0; background: var(--card);
    color: var(--text); width: min(560px, calc(100vw - 24px)); max-height: calc(100vh - 24px);
    overflow: hidden; box-shadow: 0 16px 48px rgb(0 0 0 / 30%);
}
dialog::backdrop { background: rgb(0 0 0 / 45%); }
dialog[open], form { display: flex; flex-direction: column; min-height: 0; }
form h2 { padding: 20px 24px 12px; overflow-wrap: anywhere; }
.fields { display: grid; gap: 14px; padding: 2px 24px; overflow-y: auto; }
.fields .grid {
    display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
}
label { display: grid; gap: 4px; font-weight: 500; align-content: start; }
label.checkbox { grid-template-columns: auto 1fr; gap: 4px 8px; }
.checkbox input { order: -1; }
.checkbox small { grid-column: 1 / -1; }
small { font-weight: 400; }
textarea { min-height: 120px; resize: vertical; }
.grid textarea { min-height: 0; }
form > .actions { justify-content: flex-end; padding: 14px 24px 20px; }
.wrong { color: var(--bad); margin: 0; }
form > .wrong { padding: 14px 24px 0; }
summary { cursor: pointer; margin-bottom: 12px; }
.narrow { max-width: 460px; margin: 48px auto; }

.chart { position: relative; padding: 0 16px 12px; }
.chart svg { display: block; width: 100%; height: 190px; overflow: visible; }
.chart text { fill: var(--muted); font-size: 11px; }
.chart .grid { stroke: var(--line); }
.chart .cross { stroke: var(--strong-line); }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke: var(--blue); }
.spark { width: 96px; height: 22px; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; width: 100%; }
.legend b { color: var(--text); font-weight: 600; }
.legend i { display: inline-block; width: 10px; height: 3px; margin: 0 6px 3px 0; }
.tip {
    position: absolute; top: 0; pointer-events: none; background: var(--card); z-index: 1;
    border: 1px solid var(--strong-line); border-radius: 8px; padding: 6px 10px;
    white-space: nowrap;
}
.tip td { padding: 0 0 0 12px; border: 0; }
.tip td:first-child { padding: 0; }

pre.body {
    margin: 0; padding: 12px 16px; overflow: auto; max-height: 60vh; white-space: pre-wrap;
    overflow-wrap: anywhere; background: var(--back); border-radius: 6px;
}
pre.hex { white-space: pre; overflow-wrap: normal; }
.toast {
    position: fixed; bottom: 20px; left: 50%; transform: translateX(-50%); padding: 9px 18px;
    background: var(--text); color: var(--card); border-radius: 8px; max-width: 90vw; z-index: 2;
}
.toast.wrong { background: var(--bad-back); color: var(--bad); border: 1px solid var(--bad); }
.toast:empty { display: none; }
.skip { position: absolute; left: -9999px; z-index: 3; }
.skip:focus { left: 8px; top: 8px; }
.hint { margin: 0; }

@media (max-width: 720px) {
    .bar { padding: 8px 14px; }
    .bar nav { order: 1; width: 100%; margin-left: -8px; gap: 0; flex-wrap: wrap; }
    .bar nav a { padding: 6px 8px; }
    main { padding: 14px 12px 56px; }
    .alert { padding: 10px 14px; }
    th, td { padding: 9px 10px; }
    .rare, .card > header .hint { display: none; }
    .tabs { gap: 0; }
    .tabs button { padding: 5px 7px; font-size: 14px; }
    .facts { grid-template-columns: repeat(auto-fit, minmax(100px, 1fr)); }
    .facts div { padding: 8px 12px; }
    .pair, .list { grid-template-columns: minmax(0, 1fr); }
    .head .actions { margin-left: 0; width: 100%; }
    input[type="search"] { width: 180px; }
    .list { gap: 0; }
    .list dd { margin-bottom: 8px; }
}
"""


# ---------------------------------------------------------------------------------------------
# Page script: the calls of the dashboard, and the parts that its views are made of.
# ---------------------------------------------------------------------------------------------

PAGE_SCRIPT = r"""
"use strict";

// -- Calls

const ROOT = location.pathname.replace(/\/?$/, "/");  // behind a proxy, with its prefix
const OFFLINE = "The server does not answer. Trying again…";
const ASK = "This server asks for a token.";
const TITLES = {
    401: "A token is needed", 403: "Not allowed", 404: "Not found", 409: "Conflict",
    413: "Too large", 429: "Too many attempts", 503: "Not now", 507: "Full",
};
const LOAD = 10;  // a call is repeated after so many times its own duration, or later
const LONGEST_PAUSE = 30_000;  // milliseconds
const PATIENCE = 20_000;  // milliseconds without an answer after which the server counts as gone
const {PARAMETERS, FORMS, STATES, PAGE} = JSON.parse(document.getElementById("tables").textContent);

let token = sessionStorage.getItem("linger-token") || "";
let access = null;  // what the token may do

class Failure extends Error {
    constructor(status, text) {
        super(text);
        this.status = status;
    }
}

// A path with a name in it.  A browser drops "." and ".." from a path even if they are encoded.
function path(kind, name, rest = "") {
    if (name === "." || name === "..") {
        throw new Failure(400, `A browser cannot send the name ${name}: use another client.`);
    }
    return `${kind}/${encodeURIComponent(name)}${rest}`;
}

function query(parameters) {
    const given = Object.entries(parameters).filter(([, value]) => value !== "" && value != null);
    return given.length ? `?${new URLSearchParams(given)}` : "";
}

// `fetch` takes no character beyond Latin-1, and the server reads these headers as UTF-8.
const inUtf8 = text => String.fromCharCode(...new TextEncoder().encode(text));

// A message's own headers, a line each, as those of a request.
const ownHeaders = text => text.split("\n").filter(line => line.trim()).map(line => {
    const [, name, value] = /^([\w!#$%&'*+.^`|~-]+):(.*)$/.exec(line.trim()) || [];
    if (!name) {
        throw new Failure(400, `Write each header as name: text, and not as ${line}`);
    }
    return [`x-linger-h-${name}`, inUtf8(value)];
});

// The response to a call; a Failure with a sentence in any other case.
async function call(method, target,
        {body, type, signal, accept = "application/json", own = ""} = {}) {
    const headers = [["Accept", accept], ["X-Requested-With", "Linger"], ...ownHeaders(own)];
    if (token) {
        headers.push(["Authorization", `Bearer ${inUtf8(token)}`]);
    }
    if (type) {
        headers.push(["Content-Type", type]);
    }
    let response;
    try {
        response = await fetch(ROOT + target, {method, body, headers, signal, cache: "no-store"});
    } catch (error) {
        throw signal?.aborted ? error : new Failure(0, OFFLINE);
    }
    if (response.ok) {
        return response;
    }
    const {error = response.statusText} = await response.json().catch(() => ({}));
    if (response.status === 401) {
        signOut(token ? "The token is not valid, or no longer." : ASK);
    }
    const title = TITLES[response.status] || `Error ${response.status}`;
    throw new Failure(response.status, `${title}: ${error}`);
}

async function get(target, signal) {
    const response = await call("GET", target, {signal});
    return response.json().catch(() => { throw new Failure(0, OFFLINE); });
}

// Returns what a button or a form runs: it makes a call and returns the sentence for the user.  The
// values of a form are parameters of the call, but for those whose names begin with `_`.  `target`
// is the path, or a function of the values; `said` is the sentence, or a function of the JSON of
// the response, the response, and the values.
const doing = (method, target, said) => async (values = {}) => {
    const parameters = Object.entries(values).filter(([name]) => name[0] !== "_");
    const place = typeof target === "string" ? target : target(values);
    const response = await call(method, place + query(Object.fromEntries(parameters)),
        values._body && {body: values._body, type: values._type || "text/plain",
            own: values._headers});
    return typeof said === "string" ? said
        : said(await response.json().catch(() => ({})), response, values);
};

const can = right => access.rights.includes(right);
const canServer = () => can("admin") && !access.restricted;

const polls = new Set();
const refresh = () => polls.forEach(hasten => hasten());

// Repeats some work while the view is there and the page is seen, at once after a `refresh`.
function poll(period, work, signal, load = LOAD) {
    let wake = null, again = false;
    const hasten = () => {
        again = true;
        wake?.();
    };
    const pause = time => new Promise(done => {
        wake = done;
        setTimeout(done, time);
    });
    const loop = async () => {
        while (!signal.aborted) {
            again = false;
            const started = performance.now();
            problem(work, await work().then(() => "",
                error => signal.aborted ? "" : describe(error)));
            const took = load * (performance.now() - started);
            do {
                if (!again) {
                    await pause(Math.max(period, Math.min(took, LONGEST_PAUSE)));
                }
            } while (document.hidden && !again);
        }
        polls.delete(hasten);
        problem(work, "");
    };
    polls.add(hasten);
    signal.addEventListener("abort", hasten);
    loop();
}

function describe(error) {
    if (error instanceof Failure) {
        return error.message;
    }
    console.error(error);
    return `The page failed: ${error.message}`;
}

// Reads a stream of JSON objects, one per line, until it ends.
async function stream(target, onOpen, onEvent, signal) {
    const response = await call("GET", target, {signal, accept: "application/x-ndjson"});
    onOpen();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
        const {value, done} = await reader.read().catch(() => ({done: true}));
        if (done) {
            return;
        }
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        lines.filter(line => line.startsWith("{")).forEach(line => onEvent(JSON.parse(line)));
    }
}

// -- Elements.  Whatever comes from the server becomes text: nothing here makes markup of it.

const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// An element: its tag and classes with dots between, its properties if it has any, its children.
function h(name, ...children) {
    const [tag, ...classes] = name.split(".");
    const isShape = ["svg", "line", "polyline", "text"].includes(tag);
    const element = isShape ? document.createElementNS(SVG, tag) : document.createElement(tag);
    const given = children[0]?.constructor === Object ? children.shift() : {};
    for (const [key, value] of Object.entries({class: classes.join(" ") || null, ...given})) {
        if (typeof value === "function") {
            element.addEventListener(key.slice(2), value);
        } else if (value !== false && value != null) {
            element.setAttribute(key, value === true ? "" : value);
        }
    }
    element.append(...children.flat(Infinity).filter(child => child != null && child !== false));
    return element;
}

const bdi = text => h("bdi", text);
const actions = (...items) => h("div.actions", items);
const card = (title, head, ...content) => h("section.card",
    h("header", typeof title === "string" ? h("h2", title) : title, head), content);
const button = (text, onclick, look = "") =>
    h("button", {type: "button", class: look, onclick}, text);
const linkTo = (kind, name, text = name) =>
    h("a", {href: `#/${kind}/${encodeURIComponent(name)}`}, bdi(text));
const heading = (above, title, ...tools) =>
    h("div.head", h("div", h("div.crumbs", above), h("h1", title)), actions(tools));

function put(element, text) {
    if (element.textContent !== String(text)) {
        element.textContent = text;
    }
}

// Fills an element anew only when its key has changed, so that the focus stays where it is.
function renew(element, key, make) {
    if (element.dataset.key !== key) {
        element.dataset.key = key;
        element.replaceChildren(...make());
    }
}

const problems = new Map();  // what is wrong now, by what found it

function problem(source, text) {
    problems.set(source, text);
    if (!text) {
        problems.delete(source);
    }
    const texts = [...new Set(problems.values())];
    put($("problem"), texts.join(" "));
    $("problem").hidden = !texts.length;
    const wasGone = document.body.classList.contains("stale");
    if (document.body.classList.toggle("stale", texts.includes(OFFLINE)) !== wasGone) {
        refresh();
    }
}

let toastTimer = 0;

function toast(text, look = "") {
    put($("toast"), text);
    $("toast").className = `toast ${look}`;
    clearTimeout(toastTimer);
    toastTimer = setTimeout(() => put($("toast"), ""), look ? 15_000 : 6000);
}

// Does what a button is for; says what came of it.
async function act(work) {
    try {
        toast(await work());
    } catch (error) {
        toast(describe(error), "wrong");
    }
    refresh();
}

// -- Numbers

const NONE = "\u2013";
const number = value => value.toLocaleString("en");
const plural = (n, noun) => `${number(n)} ${n === 1 ? noun : `${noun.replace(/y$/, "ie")}s`}`;
const short = value => value.toLocaleString("en", {notation: "compact"});

function rate(value) {
    return value >= 100 ? number(Math.round(value)) : value.toLocaleString("en", {
        minimumFractionDigits: value > 0 ? 1 : 0, maximumFractionDigits: 1,
    });
}

function duration(seconds) {
    const units = [["d", 86_400], ["h", 3_600], ["min", 60], ["s", 1]];
    const first = units.findIndex(([, size]) => seconds >= size);
    if (seconds < 60) {
        return `${Math.floor(seconds)} s`;
    }
    return units.slice(first, first + 2).map(([unit, size], n) => {
        const part = Math.floor((n ? seconds % units[first][1] : seconds) / size);
        return n && !part ? "" : `${part} ${unit}`;
    }).join(" ").trim();
}

function bytes(size) {
    const units = ["B", "kB", "MB", "GB", "TB"];
    const step = size < 1 ? 0 : Math.min(Math.floor(Math.log10(size) / 3), 4);
    const value = size / 1000 ** step;
    return `${value.toFixed(step && value < 10 ? 1 : 0)} ${units[step]}`;
}

// -- Tables

// A table that is updated in place, so that the focus stays where it is.  A column has a `title`
// or `head`, and `make(item)`, called once for each row, or `draw(cell, item)`.
function table(label, columns, key, none) {
    let rows = new Map();
    const body = h("tbody");
    const heads = columns.map(({title, look, by, head}) =>
        h("th", {scope: "col", class: look, "data-by": by}, head || title));
    const list = h("div.scroll", {hidden: true},
        h("table", {"aria-label": label}, h("thead", h("tr", heads)), body));
    const empty = h("div.none", {hidden: true});  // until it is known
    const make = item =>
        h("tr", columns.map(column => h("td", {class: column.look}, column.make?.(item))));
    function update(items, reason = none) {
        rows = new Map(items.map(item => [key(item), rows.get(key(item)) || make(item)]));
        for (const item of items) {
            const {cells} = rows.get(key(item));
            columns.forEach((column, n) => column.draw?.(cells[n], item));
        }
        const elements = [...rows.values()];
        if (elements.length !== body.children.length
                || elements.some((element, n) => element !== body.children[n])) {
            body.replaceChildren(...elements);
        }
        put(empty, reason);
        list.hidden = !items.length;
        empty.hidden = !list.hidden;
        return [...rows.keys()];
    }
    return {element: h("div", list, empty), heads, update};
}

const column = (title, make, look = "") => ({title, make, look});
const action = make => column("Action", make, "number action");

// A column of texts that change,
const texts = (title, text, look = "") =>
    ({title, look, draw: (cell, item) => put(cell, text(item) ?? NONE)});

// and one of numbers, in which a zero does not catch the eye.
function count(title, value, look = "", show = number) {
    return {
        title, look: `number ${look}`,
        draw(cell, item) {
            const n = value(item);
            put(cell, n == null ? NONE : show(n));
            cell.classList.toggle("zero", !n);
        },
    };
}

// The pages of a list, each known by the last item of the one before.  `load(after, like)` returns
// the items of a page, only those with the text of the filter, which `filter(label)` returns.  What
// comes after another page was turned to is dropped.
function paged(signal, period, list, load, onturn = () => {}) {
    const starts = [null];
    let keys = [], turns = 0, like = "";
    const turn = change => {
        change();
        turns++;
        onturn();
        refresh();
    };
    const reset = () => turn(() => { starts.length = 1; });
    const note = h("span");
    const back = button("Previous", () => turn(() => starts.pop()), "small");
    const next = button("Next", () => turn(() => starts.push(keys.at(-1))), "small");
    const pages = h("div.pages", {hidden: true}, note, back, next);
    poll(period, async () => {
        const asked = turns, after = starts.at(-1);
        const items = await load(after, like).catch(error => {
            if (error.status !== 404 || after == null) {
                throw error;
            }
        });
        if (!items) {
            reset();  // that after which the page begins has gone
        } else if (asked === turns) {
            keys = list.update(items, like ? "Nothing matches the filter." : undefined);
            back.disabled = starts.length === 1;
            next.disabled = keys.length < PAGE;
            put(note, starts.length > 1 ? `Page ${starts.length}` : "");
            pages.hidden = back.disabled && next.disabled;
        }
    }, signal);
    let timer = 0;
    const filter = label => h("input", {
        type: "search", placeholder: label, "aria-label": label, oninput: event => {
            clearTimeout(timer);
            timer = setTimeout(() => {
                like = event.target.value.toLowerCase();
                reset();
            }, 200);
        },
    });
    return {element: h("div", list.element, pages), reset, filter};
}

// What `load` returns of a list that the server sends whole: the page after the item `after`.
async function pageOf(items, key, after) {
    const start = after == null ? 0 : items.findIndex(item => key(item) === after) + 1;
    if (after != null && !start) {
        throw new Failure(404, "");
    }
    return items.slice(start, start + PAGE);
}

// -- Forms

// A field: name, label, help, value, placeholder, type of an input or `kind` area; `must`: the text
// that has to be typed before anything can be sent.
function control({label, help, kind = "input", must, ...field}) {
    return h("label", {class: field.type}, h("span", label),
        h(kind, {autocomplete: "off", spellcheck: "false", ...field}), help && h("small", help));
}

// A form: `some` fields side by side, others below each other, and `more` to be unfolded.
// `send(values)` returns what to say when it is done.  If that fails, the form stays.
function form(title, options, done) {
    const {text, some, fields = [], more, action, look = "main", send, extra} = options;
    const wrong = h("p.wrong", {role: "alert", hidden: true});
    const submit = h("button", {class: look}, action);
    const grid = list => h("div.grid", list.map(control));
    const shown = fields.filter(Boolean);
    const element = h("form", h("h2", {id: "dialog-title"}, title),
        h("div.fields", text && h("p.hint", text), some && grid(some), shown.map(control),
            more && h("details", h("summary", "More parameters"), grid(more))),
        wrong, actions(extra, submit));
    const must = shown.filter(field => field.must);
    const check = () => {
        submit.disabled = must.some(field => element.elements[field.name].value !== field.must);
    };
    element.addEventListener("input", check);
    element.addEventListener("submit", async event => {
        event.preventDefault();
        submit.disabled = true;
        try {
            done(await send(Object.fromEntries(new FormData(element))));
        } catch (error) {
            put(wrong, describe(error));
            wrong.hidden = false;
        }
        check();
    });
    check();
    return element;
}

// A form in a dialog; `clear` is what its second button does.
function ask(title, {clear, ...options}) {
    const dialog = $("dialog");
    const close = () => dialog.close();
    const extra = [clear && button("Clear all", () => act(clear).then(close)),
        button("Cancel", close)];
    dialog.replaceChildren(form(title, {...options, extra}, said => {
        close();
        act(() => said);
    }));
    dialog.showModal();
    dialog.querySelector("input, textarea")?.focus();
}

const parameterFields = (kind, values = {}) => FORMS[kind].map(name => {
    const [help, placeholder] = PARAMETERS[name];
    return name === "headers"
        ? {name: "_headers", label: name, help, kind: "textarea", placeholder: "name: text"}
        : {name, label: name, help, value: values[name], placeholder};
});

const contentFields = named => [
    named && {name: "_name", label: named, required: true},
    {name: "_body", label: "Message", kind: "textarea", required: true},
    {name: "_type", label: "Content type", value: "text/plain", list: "types"},
];

// -- Charts

const SPARK = 60;  // values of a sparkline

function spark(cell, values) {
    const top = Math.max(...values, 1);
    const points = values.map((value, n) =>
        `${96 - (values.length - 1 - n) * 96 / (SPARK - 1)},${20.5 - 19 * value / top}`).join(" ");
    if (!cell.firstChild) {
        cell.append(h("svg.spark", {viewBox: "0 0 96 22", "aria-hidden": "true"}, h("polyline")));
    }
    cell.querySelector("polyline").setAttribute("points", points);
}

function roundUp(value) {
    const unit = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
    return [1, 1.6, 2, 4, 5, 8, 10].map(step => step * unit).find(top => top >= value) || 10 * unit;
}

const HOUR = 3600;
const HEIGHT = 190, LEFT = 44, BOTTOM = 22;

// A chart of the last hour.  A series has a name, a color and `value(point)`; a point has an `age`
// in seconds.  A pointer or the arrow keys show the values of a moment.
class Chart {
    constructor(title, series, show) {
        this.series = series;
        this.show = show;
        this.points = [];
        this.at = null;  // the index of the point whose values are shown
        this.drawing = h("svg", {"aria-hidden": "true"});
        this.tip = h("div.tip", {role: "status", hidden: true});
        this.values = series.map(() => h("b", NONE));
        const legend = h("div.legend", series.map(({name, color}, n) => {
            const sign = h("i");
            sign.style.background = `var(--${color})`;
            return h("span", sign, `${name} `, this.values[n]);
        }));
        const leave = () => this.select(null);
        this.plot = h("div.chart", {
            tabindex: "0", role: "group",
            "aria-label": `${title}, last hour: the left and right keys show values`,
            onpointermove: event => this.point(event.offsetX), onpointerleave: leave,
            onblur: leave, onkeydown: event => this.step(event),
        }, this.drawing, this.tip);
        this.element = card(title, legend, this.plot);
        new ResizeObserver(() => this.draw()).observe(this.plot);
    }

    update(points) {
        this.points = points;
        this.series.forEach(({value}, n) => {
            put(this.values[n], points.length ? this.show(value(points.at(-1))) : NONE);
        });
        this.draw();
    }

    x(point) {
        return LEFT + (this.width - LEFT) * (1 - point.age / HOUR);
    }

    y(value) {
        return 8 + (HEIGHT - BOTTOM - 8) * (1 - value / this.top);
    }

    draw() {
        this.width = Math.max(this.plot.clientWidth - 32, 100);
        const highest = this.points.flatMap(point => this.series.map(({value}) => value(point)));
        this.top = roundUp(highest.reduce((a, b) => Math.max(a, b), 0));
        const line = (look, x1, y1, x2, y2) => h("line", {class: look, x1, y1, x2, y2});
        const label = (x, y, anchor, text) => h("text", {x, y, "text-anchor": anchor}, text);
        const parts = [0, this.top / 2, this.top].flatMap(value => [
            line("grid", LEFT, this.y(value), this.width, this.y(value)),
            label(LEFT - 8, this.y(value) + 4, "end", short(value)),
        ]);
        for (const minutes of this.width > 420 ? [60, 45, 30, 15, 0] : [60, 30, 0]) {
            parts.push(label(this.x({age: 60 * minutes}), HEIGHT - 4,
                minutes === 60 ? "start" : minutes ? "middle" : "end",
                minutes ? `${minutes} min ago` : "now"));
        }
        for (const {color, value} of this.series) {
            const points = this.points.map(point => `${this.x(point)},${this.y(value(point))}`);
            const curve = h("polyline", {points: points.join(" ")});
            curve.style.stroke = `var(--${color})`;
            parts.push(curve);
        }
        const point = this.points[this.at];
        if (point) {
            parts.push(line("cross", this.x(point), 8, this.x(point), HEIGHT - BOTTOM));
        }
        this.drawing.replaceChildren(...parts);
    }

    point(x) {
        const distances = this.points.map(point => Math.abs(this.x(point) - x + 16));
        this.select(distances.length ? distances.indexOf(Math.min(...distances)) : null);
    }

    step(event) {
        const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
        if (way && this.points.length) {
            event.preventDefault();
            const at = (this.at ?? this.points.length) + way;
            this.select(Math.min(Math.max(at, 0), this.points.length - 1));
        }
    }

    select(at) {
        this.at = at;
        const point = this.points[at];
        this.tip.hidden = !point;
        if (point) {
            const ago = point.age < 1 ? "now" : `${duration(point.age)} ago`;
            const row = ({name, value}) =>
                h("tr", h("td", name), h("td.number", this.show(value(point))));
            this.tip.replaceChildren(ago, h("table", this.series.map(row)));
            const x = this.x(point);
            const isRight = x > this.width / 2;
            this.tip.style.left = isRight ? "" : `${x + 28}px`;
            this.tip.style.right = isRight ? `${this.width - x + 28}px` : "";
        }
        this.draw();
    }
}
"""


# ---------------------------------------------------------------------------------------------
# Page views: what the dashboard shows of the server, its channels, messages and topics.
# ---------------------------------------------------------------------------------------------

PAGE_VIEWS = r"""

// -- Overview: the server, its last hour, and its channels

function facts(items) {
    const values = items.map(() => h("dd", NONE));
    return {
        element: h("dl.card.facts", items.map(([name], n) => h("div", h("dt", name), values[n]))),
        update: data => items.forEach(([, show], n) => put(values[n], show(data) ?? NONE)),
    };
}

function overview(signal) {
    const parts = [];
    if (canServer()) {
        const strip = facts([
            ["Messages", s => number(s["current-messages"])],
            ["Channels", s => number(s["current-channels"])],
            ["Consumers", s => number(s["current-waiting"])],
            ["Connections", s => number(s["current-connections"])],
            ["Database", s => s["db-size"] < 0 ? "in memory" : bytes(s["db-size"])],
            ["Free disk", s => s["db-free"] < 0 ? NONE : bytes(s["db-free"])],
            ["Uptime", s => duration(s["current-uptime"])],
            ["Version", s => s.version],
        ]);
        const series = (name, color) => ({name, color, value: point => point[name]});
        const rates = new Chart("Messages per second", [series("posted", "blue"),
            series("delivered", "green"), series("deleted", "violet"), series("failed", "red"),
        ], rate);
        const backlog = new Chart("Backlog",
            [series("ready", "blue"), series("in flight", "green")], number);
        parts.push(strip.element, h("div.pair", rates.element, backlog.element));
        poll(1000, async () => strip.update(await get("stats", signal)), signal);
        poll(5000, async () => {
            const points = chartPoints(await get("stats/history?seconds=3600", signal));
            rates.update(points);
            backlog.update(points);
        }, signal);
    }
    return [...parts, can("read") ? channelList(signal)
        : card(h("h1", "Channels"), can("write") && actions(postButton(), publishButton()),
            h("div.none", "This token may not read channels."))];
}

const SMOOTH = 6;  // points of the history that make one of a chart, so that a trend is seen

// The points of the charts from the arrays of the history: amounts become rates.
function chartPoints({interval, time, ...arrays}) {
    const points = [];
    for (let end = time.length - 1; end >= 0; end -= SMOOTH) {
        const start = Math.max(end - SMOOTH, -1);
        const seconds = start < 0 ? interval * (end + 1) : time[end] - time[start];
        const point = {age: time.at(-1) - time[end],
            ready: arrays.ready[end], "in flight": arrays["in-flight"][end]};
        for (const name of ["posted", "delivered", "deleted", "failed"]) {
            point[name] = arrays[name].slice(start + 1, end + 1)
                .reduce((sum, amount) => sum + amount, 0) / seconds;
        }
        points.unshift(point);
    }
    return points;
}

// The looks at each channel since the page was opened: of the last minute, for the sparklines.
const looks = new Map();
const RATE_LOOKS = 10;  // over which a rate is measured

function addLook(info) {
    const past = looks.get(info.channel) || [];
    looks.delete(info.channel);
    looks.set(info.channel, [...past, {...info, at: performance.now() / 1000}].slice(-SPARK));
    if (looks.size > 1000) {
        looks.delete(looks.keys().next().value);
    }
}

function rateOf(channel, event) {
    const past = looks.get(channel).slice(-RATE_LOOKS);
    const first = past[0], last = past.at(-1);
    if (!first.events || !last.events || first === last) {
        return null;
    }
    return Math.max(last.events[event] - first.events[event], 0) / (last.at - first.at);
}

function channelList(signal) {
    let order = "name";
    const sortable = (by, column) => ({...column, by, head: button(column.title, () => {
        order = by;
        mark();
        pages.reset();
    })});
    const rates = (title, event) => count(title, c => rateOf(c.channel, event), "rare", rate);
    const list = table("Channels", [
        sortable("name", {title: "Channel", look: "wide", make: channelCell, draw: drawMarks}),
        sortable("ready", count("Ready", c => c.ready)),
        count("In flight", c => c["in-flight"]),
        count("Delayed", c => c.delayed, "rare"),
        sortable("oldest", count("Oldest", c => c.oldest, "", duration)),
        count("Consumers", c => c.waiting, "rare"),
        rates("Posted/s", "posted"),
        rates("Deleted/s", "deleted"),
        {title: "Backlog", look: "rare", draw: (cell, c) => spark(cell, looks.get(c.channel).map(
            look => look.ready + look["in-flight"]))},
    ], info => info.channel,
        "No channels. One appears when a message is posted or a consumer waits.");
    const mark = () => list.heads.forEach(head => head.setAttribute("aria-sort",
        head.dataset.by !== order ? "none" : order === "name" ? "ascending" : "descending"));
    const pages = paged(signal, 1000, list, async (after, like) => {
        const target = "channels" + query({info: 1, n: PAGE, order, like, after});
        const {channels} = await get(target, signal);
        channels.forEach(addLook);
        return channels;
    });
    mark();
    return card(h("h1", "Channels"),
        actions(pages.filter("Filter channels"), can("write") && postButton()), pages.element);
}

const channelCell = ({channel}) => [linkTo("channels", channel), " ", h("span")];

function drawMarks(cell, {paused, blocked, settings}) {
    const marks = [
        paused && ["mark.warn", "paused"],
        blocked && ["mark", `${number(blocked)} blocked`],
        settings.dead && ["mark", `dead letters: ${settings.dead}`],
    ].filter(Boolean);
    renew(cell.lastChild, JSON.stringify(marks), () =>
        marks.flatMap(([look, text]) => [h(`span.${look}`, bdi(text)), " "]));
}

// -- Posting and publishing

function postButton(channel) {
    return button("Post", () => ask(channel == null ? "Post a message" : `Post to ${channel}`, {
        fields: contentFields(channel == null && "Channel"), more: parameterFields("post"),
        action: "Post",
        send: doing("POST", ({_name = channel}) => path("channels", _name),
            ({id, duplicate}) => `${duplicate ? "A duplicate of" : "Posted as"} message ${id}`),
    }), "main");
}

function publishButton(topic) {
    const title = topic == null ? "Publish a message" : `Publish on ${topic}`;
    return button("Publish", () => ask(title, {
        fields: contentFields(topic == null && "Topic"), more: parameterFields("publish"),
        action: "Publish",
        send: doing("POST", ({_name = topic}) => path("topics", _name),
            ({duplicate, ...copies}, {headers}) => {
                const dropped = headers.get("x-linger-dropped");
                return `${duplicate ? "A duplicate of a publication" : "Published"} to `
                    + plural(Object.keys(copies).length, "channel")
                    + (dropped ? `; not to ${decodeURIComponent(dropped)}: full` : "");
            }),
    }), "main");
}

// -- A channel

const STATE_NAMES = {"": "all", hidden: "in flight"};
const stateName = state => STATE_NAMES[state] || state;
const crumb = (text, href) => h("a", {href}, text);

function channelView(signal, channel) {
    const strip = facts([
        ["Ready", i => number(i.ready)],
        ["In flight", i => number(i["in-flight"])
            + (i.settings["max-in-flight"] ? ` of ${number(i.settings["max-in-flight"])}` : "")],
        ["Delayed", i => number(i.delayed)],
        ["Blocked", i => number(i.blocked)],
        ["Oldest ready", i => i.oldest == null ? NONE : duration(i.oldest)],
        ["Consumers", i => number(i.waiting)],
    ]);
    const paused = h("span.mark.warn", {hidden: true}, "paused");
    const pause = button("Pause", () => paused.hidden ? askPause(channel)
        : act(doing("DELETE", path("channels", channel, "/pause"), "Resumed")));
    const subscribed = subscriptions(channel);
    const settings = settingsCard(path("channels", channel, "/settings"), "settings",
        `Settings of ${channel}`, "They hold for messages that do not say otherwise.");
    poll(1000, async () => {
        const info = await get(path("channels", channel, "/info"), signal);
        [strip, subscribed, settings].forEach(part => part.update(info));
        paused.hidden = !info.paused;
        put(pause, info.paused ? "Resume" : "Pause");
    }, signal);
    return [
        heading(crumb("Channels", "#/"), [bdi(channel), " ", paused],
            can("admin") && [
                pause,
                button("Redrive", () => askRedrive(channel)),
                button("Drain", () => askDrain(channel), "danger"),
            ],
            can("write") && postButton(channel)),
        strip.element,
        liveCard(signal, path("channels", channel, "/live"), "Every change, as it happens"),
        messageList(signal, channel),
        h("div.pair", subscribed.element, settings.element),
    ];
}

function askPause(channel) {
    ask(`Pause ${channel}`, {
        text: "Consumers get nothing while it is paused; messages can still be posted.",
        fields: [{name: "for", label: "Seconds", placeholder: "until it is resumed"}],
        action: "Pause",
        send: doing("PUT", path("channels", channel, "/pause"), "Paused"),
    });
}

function askRedrive(channel) {
    ask(`Redrive ${channel}`, {
        text: "Moves its ready dead letters back to where they came from, in their order.",
        fields: [
            {name: "n", label: "How many", placeholder: "all"},
            {name: "to", label: "To the channel", placeholder: "where each came from",
                required: access.restricted},
        ],
        action: "Redrive",
        send: doing("POST", path("channels", channel, "/redrive"),
            ({moved}) => `Moved ${plural(moved, "message")}`),
    });
}

function askDrain(channel) {
    ask(`Drain ${channel}`, {
        text: "Deletes all its messages, those in flight and delayed too. This cannot be undone.",
        fields: [{name: "_name", label: "Type the channel's name to confirm", must: channel}],
        action: "Delete all messages", look: "danger",
        send: doing("DELETE", path("channels", channel), "Drained"),
    });
}

function messageList(signal, channel) {
    let state = "", messages = [];
    const tick = (label, onchange, value) =>
        h("input", {type: "checkbox", "aria-label": label, onchange, value});
    const all = tick("Choose all on this page", () => choose(all.checked));
    const list = table("Messages", [
        {look: "tick", head: all, make: ({id}) =>
            tick(`Choose message ${id}`, () => drawBulk(), id)},
        column("Message", ({id}) => linkTo("messages", id)),
        column("Body", message => bdi(preview(message)), "wide mono"),
        texts("State", m => stateName(m.state), "rare"),
        count("Priority", m => m.priority, "rare"),
        count("Delivered", m => m.delivered),
        count("Age", m => m.received, "", duration),
    ], message => message.id, "No messages in this state.");
    const bulk = actions();
    const ticks = () => [...list.element.querySelectorAll("td input")];
    const chosen = () => {
        const ids = ticks().filter(input => input.checked).map(input => input.value);
        return messages.filter(({id}) => ids.includes(String(id)));
    };
    const choose = wanted => {
        [all, ...ticks()].forEach(input => { input.checked = wanted; });
        drawBulk();
    };
    const drawBulk = () => renew(bulk, JSON.stringify(chosen().map(m => [m.id, m.state])), () =>
        chosen().length ? [`${number(chosen().length)} chosen`,
            ...messageActions(chosen, () => choose(false))] : []);
    const pages = paged(signal, 2000, list, async after => {
        const target = "/messages" + query({state, n: PAGE, after});
        messages = await get(path("channels", channel, target), signal);
        drawBulk();
        return messages;
    }, () => choose(false));
    const tabs = h("div.tabs", {role: "group", "aria-label": "State"},
        ["", ...STATES].map(value => h("button", {
            type: "button", "aria-pressed": String(value === state), onclick: event => {
                state = value;
                for (const tab of tabs.children) {
                    tab.setAttribute("aria-pressed", tab === event.currentTarget);
                }
                pages.reset();
            },
        }, stateName(value))));
    return card("Messages", [tabs, bulk], pages.element);
}

function preview({body, encoding, cut}) {
    if (encoding) {
        return `${cut ? "over " : ""}${atob(body).length} bytes, binary`;
    }
    return cut || body.length > 200 ? `${body.slice(0, 200)}…` : body;
}

// What can be done to messages, one or many: each gets what the call says, and they are counted.
function messageActions(chosen, done = () => {}) {
    const each = (method, rest, past) => async (values = {}) => {
        let count = 0;
        const said = () => `${past} ${plural(count, "message")}`;
        for (const {id} of chosen()) {
            await call(method, `messages/${id}${rest}${query(values)}`).catch(error => {
                throw count ? new Failure(error.status, `${said()}. ${error.message}`) : error;
            });
            count++;
        }
        done();
        return said();
    };
    const post = (title, rest, past) => button(title, () => act(each("POST", rest, past)), "small");
    const change = button("Change", () => ask("Change what waits", {
        text: "What is left empty stays as it is.",
        some: parameterFields("change").map(field => ({...field, placeholder: "unchanged"})),
        action: "Save", send: each("PATCH", "", "Changed"),
    }), "small");
    const remove = button("Delete", () => act(async () => {
        const response = await call("POST", "messages/delete", {
            body: JSON.stringify(chosen().map(message => message.id)), type: "application/json",
        });
        done();
        return `Deleted ${plural((await response.json()).deleted.length, "message")}`;
    }), "small danger");
    const inFlight = chosen().filter(message => message.state === "hidden").length;
    return [
        can("read") && inFlight === chosen().length && post("Release", "/release", "Released"),
        can("write") && !inFlight && change,
        can("read") && post("Reject", "/reject", "Rejected"),
        can("admin") && chosen().every(message => message["dead-from"])
            && post("Redrive", "/redrive", "Moved"),
        can("read") && remove,
    ].filter(Boolean);
}

// Topics and patterns in one list, each with what it is.
const both = (topics, patterns) => [...topics.map(name => ({kind: "topics", name})),
    ...patterns.map(name => ({kind: "patterns", name}))];
const kindKey = ({kind, name}) => `${kind} ${name}`;
const kindCell = ({kind, name}) =>
    [linkTo(kind, name), kind === "patterns" && [" ", h("span.mark", "pattern")]];

function subscriptions(channel) {
    const list = table("Subscriptions", [
        column("Topic", kindCell, "wide"),
        action(one => can("admin") && unsubscribeButton(channel, one)),
    ], kindKey, "Not subscribed to any topic.");
    const update = ({topics, patterns}) => list.update(both(topics, patterns));
    const subscribe = button("Subscribe", () => askSubscribe({channel}), "small");
    const element = card("Subscriptions", can("admin") && actions(subscribe), list.element);
    return {element, update};
}

const unsubscribeButton = (channel, {kind, name}) => button("Unsubscribe", () => act(doing(
    "DELETE", () => path("channels", channel, path(`/${kind}`, name)),
    `${channel} is no longer subscribed to ${name}`)), "small");

// Subscribes a channel or to a topic, whichever is not given.
function askSubscribe({channel, topic}) {
    const names = ({_name}) => [channel ?? _name, topic ?? _name];
    ask(topic == null ? "Subscribe to a topic" : `Subscribe a channel to ${topic}`, {
        fields: [
            {name: "_name", label: topic == null ? "Topic" : "Channel", required: true},
            topic == null && {name: "_pattern", type: "checkbox", label: "It is a pattern",
                help: "Words with dots between: * is one word, # any number of words."},
            topic != null && {name: "since", label: "Copy what is kept since",
                placeholder: "nothing", help: "all, an age as 5m, or the id of a publication"},
        ],
        more: parameterFields("subscribe"), action: "Subscribe",
        send: doing("PUT", values => {
            const [to, name] = names(values);
            return path("channels", to, path(values._pattern ? "/patterns" : "/topics", name));
        }, (_, __, values) => names(values).join(" is subscribed to ")),
    });
}

// The settings of a channel or topic: those of a form, at a path of their own.
function settingsCard(target, kind, title, text) {
    const values = h("dl.list");
    let settings = {};
    const edit = button("Change", () => ask(title, {
        text, some: parameterFields(kind, settings), action: "Save",
        send: doing("PUT", target, "Settings saved"),
        clear: doing("DELETE", target, "Settings cleared"),
    }), "small");
    const update = info => {
        settings = info.settings;
        renew(values, JSON.stringify(settings), () => FORMS[kind].flatMap(name => [
            h("dt", name),
            h("dd", settings[name] == null || settings[name] === ""
                ? h("span.zero", PARAMETERS[name][1] === "" ? "none" : PARAMETERS[name][1],
                    " (default)")
                : bdi(settings[name])),
        ]));
    };
    const element = card("Settings", can("admin") && actions(edit), h("div.inside", values));
    return {element, update};
}

// -- A message

const SHOWN_BODY = 262_144;  // bytes of a body that are read to be shown,
const SHOWN_HEX = 16_384;  // and in hexadecimal
const KNOWN = ["body", "encoding", "cut", "id", "name", "state"];

function messageView(signal, id) {
    const before = BigInt(id) - 1n;
    const values = h("dl.list");
    const history = h("ul");
    const mark = h("span.mark");
    const place = h("span");
    const tools = actions();
    const body = h("div.inside", NONE);
    let loaded = false;
    const gone = error => {
        if (error.status !== 404) {
            throw error;
        }
        put(mark, "gone");
        renew(tools, "", () => []);
    };
    const load = async () => {
        const {headers} = await call("HEAD", path("messages", id), {signal});
        const channel = decodeURIComponent(headers.get("x-linger-channel"));
        const [message] = await get(path("channels", channel,
            `/messages?n=1&after=${before}`), signal);
        if (String(message?.id) !== id) {
            throw new Failure(404, "");  // it has just been moved
        }
        put(mark, stateName(message.state));
        renew(place, channel, () => [crumb("Channels", "#/"), " / ", linkTo("channels", channel)]);
        const size = bytes(Number(headers.get("content-length")));
        values.replaceChildren(...factsOf({size, ...message}));
        history.replaceChildren(...messageHistory(message).map(text => h("li", text)));
        renew(tools, message.state + message["dead-from"], () => messageActions(() => [message]));
        if (!loaded) {
            body.replaceChildren(...await bodyParts(id, message.type, signal));
            loaded = true;
        }
    };
    poll(2000, () => load().catch(gone), signal);
    return [
        heading(place, [`Message ${id} `, mark], tools),
        card("Body", null, body),
        h("div.pair",
            card("Parameters", null, h("div.inside", values)),
            card("History", null, h("div.inside", history))),
    ];
}

// The fields of a message or schedule that are shown nowhere else.
const factsOf = object =>
    Object.entries(object).filter(([name]) => !KNOWN.includes(name)).flatMap(([name, value]) => [
        h("dt", name),
        h("dd", bdi(value == null || value === "" ? NONE : typeof value !== "object" ? value
            : Object.entries(value).map(pair => pair.join(": ")).join("\n"))),
    ]);

function messageHistory(message) {
    const from = message["dead-from"];
    return [
        `Posted ${duration(message.received)} ago`
            + (message.topic ? ` on the topic ${message.topic}` : ""),
        message["reply-to"] && "Its sender waits for a reply",
        from && `Given up in ${from} after ${plural(message["dead-delivered"], "delivery")}: ${
            REASONS[message["dead-reason"]]}`,
        (message.delivered ? `Delivered ${plural(message.delivered, "time")}` : "Not delivered")
            + (message.deliver ? `, of at most ${plural(message.deliver, "time")}` : "")
            + (from ? " since then" : ""),
        message.error && `Last error: ${message.error}`,
        message.holder && `In flight with ${message.holder}`,
        message["hidden-for"] != null && `Hidden for ${duration(message["hidden-for"])} more`,
        message.state === "blocked" && `Waits for an earlier message of the group ${message.group}`,
        message.delay && `Ready in ${duration(message.delay)}`,
        message.linger && `Kept for ${duration(message.linger)} after its post`,
    ].filter(Boolean);
}

const REASONS = {
    deliver: "its deliveries were used up", linger: "its lifetime was over",
    reject: "a consumer rejected it",
};

async function bodyParts(id, type, signal) {
    const response = await call("GET", path("messages", id), {signal});
    const size = Number(response.headers.get("content-length"));
    const data = await beginning(response.body.getReader(), SHOWN_BODY);
    const pre = h("pre.body", {dir: "auto", tabindex: "0", "aria-label": "Body"});
    let text = null;
    try {
        text = new TextDecoder("utf-8", {fatal: true}).decode(data, {stream: data.length < size});
    } catch {
        pre.classList.add("hex");
    }
    const formatted = text != null && data.length === size && formatJson(text, type);
    put(pre, formatted || (text ?? hexadecimal(data.subarray(0, SHOWN_HEX))));
    const raw = button("Show as sent", () => {
        const isRaw = pre.textContent === text;
        put(pre, isRaw ? formatted : text);
        put(raw, isRaw ? "Show as sent" : "Show formatted");
    }, "small");
    const shown = text == null ? Math.min(data.length, SHOWN_HEX) : data.length;
    return [pre, actions(formatted && raw,
        button("Download", () => act(() => download(id)), "small"),
        shown < size && h("span.hint", `The first ${bytes(shown)} of ${bytes(size)}`))];
}

async function beginning(reader, limit) {
    const data = new Uint8Array(limit);
    let length = 0;
    while (length < limit) {
        const {value, done} = await reader.read();
        if (done) {
            break;
        }
        data.set(value.subarray(0, limit - length), length);
        length += value.length;
    }
    reader.cancel();
    return data.subarray(0, Math.min(length, limit));
}

// JSON laid out in lines; "" for what is none.  Numbers keep their digits, also beyond 2^53.
function formatJson(text, type) {
    if (!/json/i.test(type) && !/^\s*[[{]/.test(text)) {
        return "";
    }
    const exact = (_, value, {source}) =>
        typeof value === "number" ? JSON.rawJSON(source) : value;
    try {
        return JSON.stringify(JSON.parse(text, exact), null, 2);
    } catch {
        return "";  // a browser before 2025 lays out nothing
    }
}

function hexadecimal(data) {
    const lines = [];
    for (let at = 0; at < data.length; at += 16) {
        const row = [...data.subarray(at, at + 16)];
        const codes = row.map(byte => byte.toString(16).padStart(2, "0")).join(" ");
        const texts = row.map(byte => byte > 32 && byte < 127 ? String.fromCharCode(byte) : ".");
        lines.push(`${at.toString(16).padStart(6, "0")}  ${codes.padEnd(47)}  ${texts.join("")}`);
    }
    return lines.join("\n");
}

async function download(id) {
    const response = await call("GET", path("messages", id));
    const type = "application/octet-stream";  // that no browser takes for a page of this server
    const url = URL.createObjectURL(new Blob([await response.blob()], {type}));
    h("a", {href: url, download: `message-${id}`}).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
    return `Message ${id} downloaded`;
}

// -- Live

const TAIL = 100;  // events shown

function liveCard(signal, target, what) {
    let stop = null, events = [], total = 0, timer = 0;
    const list = table("Events", [
        column("Time", event => event.time, "mono"),
        column("Event", event => event.event || "published"),
        column("Message", ({event, id}) => event && linkTo("messages", id)),
        column("Body", event => bdi(preview(event)), "wide mono"),
    ], event => event.number, "Nothing has happened yet.");
    const toggle = button("Start", () => {
        if (stop) {
            stop.abort();
            stop = null;
        } else {
            stop = new AbortController();
            const started = stop.signal;
            signal.addEventListener("abort", () => stop?.abort());
            poll(1000, () => stream(target, show, add, started), started, 0);
        }
        put(toggle, stop ? "Stop" : "Start");
    }, "small");
    function add(event) {
        const time = new Date().toLocaleTimeString("en-GB");
        events = [{...event, time, number: total++}, ...events].slice(0, TAIL);
        timer ||= setTimeout(show, 200);
    }
    function show() {
        timer = 0;
        list.update(events);
    }
    return card("Live", [h("span.hint", what), actions(toggle)], h("div.live", list.element));
}

// -- Topics

function topicList(signal) {
    const list = table("Topics", [column("Topic", kindCell, "wide")], kindKey,
        "No topics. One appears when a channel subscribes to it.");
    const open = button("Open a topic", () => ask("Open a topic", {
        text: "It need not have subscribers: it may keep what is published.",
        fields: [{name: "name", label: "Topic", required: true}], action: "Open",
        send: async ({name}) => {
            location.hash = `#/topics/${encodeURIComponent(name)}`;
            return "";
        },
    }));
    const pages = paged(signal, 5000, list, async (after, like) => {
        const [{topics}, {patterns}] = await Promise.all(
            ["topics", "patterns"].map(target => get(target, signal)));
        const found = both(topics, patterns).filter(({name}) => name.toLowerCase().includes(like));
        return pageOf(found, kindKey, after);
    });
    return card(h("h1", "Topics"), actions(pages.filter("Filter topics"),
        can("admin") && open, can("write") && publishButton()), pages.element);
}

const topicHead = (name, ...tools) => heading(crumb("Topics", "#/topics"), bdi(name), tools);

function topicView(signal, topic) {
    const list = table("Subscribers", [
        column("Channel", ({channel}) => linkTo("channels", channel), "wide"),
        column("Subscription", kindCell),
        action(one => can("admin") && unsubscribeButton(one.channel, one)),
    ], one => `${one.channel} ${kindKey(one)}`, "No subscribers: what is published is dropped.");
    poll(2000, async () => {
        const {channels, patterns = {}} = await get(path("topics", topic, "/channels"), signal);
        const each = (kind, name, of) => of.map(channel => ({kind, name, channel}));
        list.update([...each("topics", topic, channels), ...Object.entries(patterns).flatMap(
            ([pattern, of]) => each("patterns", pattern, of))]);
    }, signal);
    const kept = table("Kept publications", [
        column("Publication", ({id}) => id),
        column("Type", ({type}) => bdi(type), "rare"),
        column("Body", one => bdi(preview(one)), "wide mono"),
    ], ({id}) => id, "Nothing is kept for readers that come later.");
    const pages = paged(signal, 5000, kept, after =>
        get(path("topics", topic, "/messages" + query({n: PAGE, since: after})), signal));
    const place = path("topics", topic, "/settings");
    const settings = settingsCard(place, "topic", `Settings of ${topic}`,
        "What is published is kept for readers that come later.");
    poll(5000, async () => settings.update({settings: await get(place, signal)}), signal);
    return [
        topicHead(topic,
            can("admin") && button("Subscribe a channel", () => askSubscribe({topic})),
            can("write") && publishButton(topic)),
        card("Subscribers", null, list.element),
        liveCard(signal, path("topics", topic, "/live"), "Every publication, as it happens"),
        card("Kept publications", null, pages.element),
        settings.element,
    ];
}

const patternView = (signal, pattern) => [
    topicHead(pattern),
    liveCard(signal, path("patterns", pattern, "/live"), "Publications on topics that match"),
];

// -- Schedules

const scheduleActions = name => [
    can("write") && button("Run", () => act(doing("POST", () => path("schedules", name, "/run"),
        ({id}) => `Posted as message ${id}`)), "small"),
    " ",
    can("admin") && button("Delete", () => ask(`Delete the schedule ${name}`, {
        text: "What it has posted stays.", action: "Delete", look: "danger",
        send: doing("DELETE", () => path("schedules", name), () => {
            location.hash = "#/schedules";
            return "Schedule deleted";
        }),
    }), "small danger"),
];

function scheduleView(signal, name) {
    const body = h("pre.body", {dir: "auto", tabindex: "0", "aria-label": "Body"});
    const values = h("dl.list");
    poll(5000, async () => {
        const schedule = await get(path("schedules", name), signal);
        put(body, schedule.encoding ? preview(schedule) : schedule.body);
        values.replaceChildren(...factsOf(schedule));
    }, signal);
    return [
        heading(crumb("Schedules", "#/schedules"), bdi(name), scheduleActions(name)),
        card("Message", null, h("div.inside", body)),
        card("Parameters", null, h("div.inside", values)),
    ];
}

function scheduleList(signal) {
    const moment = text => text?.replace("T", " ");
    const list = table("Schedules", [
        column("Schedule", ({name}) => linkTo("schedules", name)),
        {title: "Channel", draw: (cell, s) =>
            renew(cell, s.channel, () => [linkTo("channels", s.channel)])},
        texts("Times", s => s.every ? `every ${duration(s.every)}` : `${s.cron} (${s.tz})`, "rare"),
        texts("Next", s => moment(s.next)),
        texts("Last", s => moment(s.last), "rare"),
        texts("Last error", s => s["last-error"], "wide"),
        action(({name}) => scheduleActions(name)),
    ], ({name}) => name, "No schedules. They post messages at certain times.");
    const pages = paged(signal, 5000, list, async (after, like) => {
        const {schedules} = await get("schedules", signal);
        return pageOf(schedules.filter(({name, channel}) =>
            `${name} ${channel}`.toLowerCase().includes(like)), ({name}) => name, after);
    });
    const create = button("New schedule", () => ask("New schedule", {
        text: "It replaces one that has the same name.",
        some: [
            {name: "_name", label: "Name", required: true},
            {name: "channel", label: "Channel", required: true},
            {name: "cron", label: "Times",
                help: "minute, hour, day, month, weekday, as 0 3 * * mon-fri; or @daily"},
            {name: "tz", label: "Time zone of these", placeholder: "UTC"},
            {name: "every", label: "Or every", placeholder: "seconds"},
            {name: "catch-up", type: "checkbox", value: "no", label: "Skip missed times",
                help: "else there is one post for them"},
        ],
        fields: contentFields(),
        more: parameterFields("schedule"), action: "Save",
        send: doing("PUT", ({_name}) => path("schedules", _name), "Schedule saved"),
    }), "main");
    return card(h("h1", "Schedules"),
        actions(pages.filter("Filter schedules"), can("admin") && create), pages.element);
}

// -- Dead letters

function deadList(signal) {
    let reason = "", order = "newest";
    const redrive = message => button("Redrive", () => act(doing("POST",
        `messages/${message.id}/redrive`, `Message ${message.id} is back in ${message["dead-from"]}`
    )), "small");
    const list = table("Dead letters", [
        column("Message", ({id}) => linkTo("messages", id)),
        column("From", message => linkTo("channels", message["dead-from"])),
        texts("Reason", message => message["dead-reason"]),
        column("Error", message => bdi(message.error || preview(message)), "wide rare"),
        count("Deliveries", message => message["dead-delivered"], "rare"),
        count("Age", message => message.received, "", duration),
        column("Now in", message => linkTo("channels", message.channel), "rare"),
        action(redrive),
    ], message => message.id, "No dead letters.");
    const pages = paged(signal, 2000, list, after =>
        get("dead-letters" + query({n: PAGE, reason, order, after}), signal));
    const choose = (label, values, pick) => h("select", {
        "aria-label": label, onchange: event => {
            pick(event.target.value);
            pages.reset();
        },
    }, values.map(([value, text]) => h("option", {value}, text)));
    const reasons = choose("Reason", [["", "All reasons"], ["deliver", "Deliveries used up"],
        ["linger", "Lifetime over"], ["reject", "Rejected"]], value => { reason = value; });
    const orders = choose("Order", [["newest", "Newest first"], ["oldest", "Oldest first"]],
        value => { order = value; });
    return card(h("h1", "Dead letters"), actions(reasons, orders), pages.element);
}

// -- Which view is shown

const LISTS = {topics: topicList, schedules: scheduleList, dead: deadList};
const VIEWS = {channels: channelView, messages: messageView, topics: topicView,
    patterns: patternView, schedules: scheduleView};
let view = new AbortController();

function show(...parts) {
    $("main").replaceChildren(...parts.flat());
}

function route() {
    $("dialog").close();
    view.abort();
    view = new AbortController();
    if (!access) {
        return;
    }
    const [kind = "", text = ""] = location.hash.slice(2).split("/");
    let name = "";
    try {
        name = decodeURIComponent(text);
        show(name && VIEWS[kind] ? VIEWS[kind](view.signal, name)
            : (LISTS[kind] || overview)(view.signal));
    } catch (error) {
        show(card("This cannot be shown", null, h("div.none", describe(error))));
    }
    document.title = name ? `${name} | Linger` : "Linger";
    const place = kind === "patterns" ? "topics" : LISTS[kind] ? kind : "";
    for (const link of $("views").children) {
        link.setAttribute("aria-current", link.hash === `#/${place}` ? "page" : "false");
    }
    $("main").focus();
}

// -- Signing in

function signOut(why) {
    token = "";
    access = null;
    sessionStorage.removeItem("linger-token");
    view.abort();
    $("views").hidden = true;
    $("sign").hidden = true;
    const enter = form("Sign in", {
        text: why,
        fields: [{name: "token", label: "Token", type: "password", required: true,
            help: "It is kept until this tab is closed."}],
        action: "Sign in",
        send: async values => {
            token = values.token.trim();
            await start();
        },
    }, () => {});
    show(h("section.card.narrow", enter));
    enter.querySelector("input").focus();
}

async function start() {
    const {hostname, version} = await get("");
    access = await get("access");
    if (token) {
        sessionStorage.setItem("linger-token", token);
    }
    put($("host"), hostname);
    $("host").title = `Linger ${version}`;
    $("views").hidden = false;
    $("topics").hidden = $("schedules").hidden = !can("read");
    $("dead").hidden = !canServer();
    $("sign").hidden = !token;
    route();
}

async function look() {
    const light = $("light");
    try {
        await get("health", AbortSignal.timeout(PATIENCE));
        light.className = "light good";
        put(light, "Healthy");
    } catch (error) {
        light.className = "light bad";
        put(light, error.status ? "Not healthy" : "Not reachable");
        throw error.status ? error : new Failure(0, OFFLINE);
    }
    if (!access && !$("main").firstChild) {
        await start().catch(error => {
            if (error.status !== 401) {
                throw error;
            }
        });
    }
}

document.body.append(h("datalist", {id: "types"},
    ["text/plain", "application/json"].map(value => h("option", {value}))));
$("sign").addEventListener("click", () => signOut(ASK));
$("skip").addEventListener("click", () => $("main").focus());
addEventListener("hashchange", route);
poll(5000, look, new AbortController().signal);
"""


# ---------------------------------------------------------------------------------------------
# Page: the dashboard as one static document, with the policy that a browser enforces on it.
# ---------------------------------------------------------------------------------------------

PAGE_DOCUMENT = """
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Linger</title>
<link rel="icon" href="data:image/svg+xml,{icon}">
<style>{style}</style>
</head>
<body>
<button class="skip" id="skip">Skip to the content</button>
<header class="bar">
    <a class="brand" href="#/">{logo} Linger</a>
    <nav aria-label="Views" id="views" hidden>
        <a href="#/">Channels</a>
        <a href="#/topics" id="topics">Topics</a>
        <a href="#/schedules" id="schedules">Schedules</a>
        <a href="#/dead" id="dead">Dead letters</a>
    </nav>
    <div class="server">
        <span id="host"></span>
        <span id="light" class="light" role="status">Connecting</span>
        <button id="sign" class="small" hidden>Sign out</button>
    </div>
</header>
<div id="problem" class="alert" role="alert" hidden></div>
<main id="main" tabindex="-1"></main>
<div id="toast" class="toast" role="status"></div>
<dialog id="dialog" aria-labelledby="dialog-title"></dialog>
<noscript><div class="alert">The dashboard needs JavaScript.</div></noscript>
<script type="application/json" id="tables">{tables}</script>
<script>{script}</script>
</body>
</html>
"""

LOGO = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" aria-hidden="true" fill="none"'
    ' stroke="{color}" stroke-width="2.4" stroke-linecap="round"><path d="M4 6h16M4 12h11M4 18h6"/>'
    '<circle cx="19" cy="15.5" r="3"/></svg>'
)

# Which calls take a parameter: the script makes their forms of it.
FORMS = {
    "post": ALL_PARAMETERS,
    "publish": PUBLISH_PARAMETERS,
    "schedule": SCHEDULE_PARAMETERS,
    "subscribe": MESSAGE_PARAMETERS,
    "change": CHANGE_PARAMETERS,
    "settings": CHANNEL_PARAMETERS,
    "topic": RETENTION_PARAMETERS,
}


def source_hash(text: str) -> str:
    """What allows a script or style in a Content-Security-Policy (w3.org/TR/CSP3, 2.3.1)."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def entity_tag(body: bytes) -> str:
    """The strong entity tag of a body (RFC 9110 8.8.3)."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def page_tables() -> str:
    """The tables that the script needs, as JSON that may stand in a document."""
    forms = {name: names_in(table) for name, table in FORMS.items()}
    parameters = {
        p.name: (p.help, "" if p.default is None else p.default)
        for table in FORMS.values()
        for p in table
    }
    tables = {"PARAMETERS": parameters, "FORMS": forms, "STATES": STATES, "PAGE": LISTED}
    return TO_JSON(tables).replace("<", "\\u003c")


class Page(NamedTuple):
    """The document, and the header lines of a response with it."""

    body: bytes
    etag: str
    headers: str


@functools.cache
def page() -> Page:
    """The dashboard, without the comments and most of the white space of its source.

    The policy allows its own script and style only, calls to its own server only, and, where a
    browser knows trusted types, nothing that makes markup of a text.
    """
    style, script = (
        "\n".join(re.findall(r"(?m)^ *(?!//)(\S.*?)(?:  //.*)?$", source))
        for source in (PAGE_STYLE, PAGE_SCRIPT + PAGE_VIEWS)
    )
    style = re.sub(r"\s*([{};:,])\s*", r"\1", style)
    document = PAGE_DOCUMENT.lstrip()
    for name, text in (
        ("icon", urllib.parse.quote(LOGO.format(color="#1f56c9"))),
        ("logo", LOGO.format(color="currentColor")),
        ("tables", page_tables()),
        ("style", style),
        ("script", script),
    ):
        document = document.replace(f"{{{name}}}", text)
    body = document.encode()
    etag = entity_tag(body)
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none';"
        f" form-action 'none'; frame-ancestors 'none'; style-src {source_hash(style)};"
        f" script-src {source_hash(script)}; require-trusted-types-for 'script'; trusted-types"
        " 'none'"
    )
    headers = (
        f"Content-Security-Policy: {policy}\r\nReferrer-Policy: same-origin\r\n"
        f"Cache-Control: no-cache\r\nETag: {etag}\r\n{VARY}"
    )
    return Page(body, etag, headers)


# ---------------------------------------------------------------------------------------------
# OpenAPI: the description of the API for programs (spec.openapis.org/oas/v3.1.0).  It is made of
# the tables of routes and parameters, and of those here: the values that a parameter may have, and
# the answers of each endpoint.  A test fails for a route that lacks something.
# ---------------------------------------------------------------------------------------------

Schema = dict[str, Any]  # a JSON Schema


def _whole(minimum: int = MIN_INTEGER, maximum: int = MAX_INTEGER) -> Schema:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(required: Mapping[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **optional}, "required": [*required]}


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


ANY: Schema = {}
TEXT: Schema = {"type": "string"}
NO_CONTROL = "[^\\u0000-\\u001f\\u007f-\\u009f]"  # as a schema has it
NAME: Schema = {"type": "string", "maxLength": MAX_NAME, "pattern": f"^{NO_CONTROL}+$"}
NAMES = _array(NAME)
SWITCH: Schema = {"type": "boolean"}
COUNT = _whole(0)
FLAT: Schema = {"type": ["string", "number", "boolean", "null"]}  # values of other fields

# The values of a message's parameters, beside integers.
VALUES_OF_PARSERS: Mapping[Callable[[str, object], object], Schema] = {
    _parse_dead_channel: {**NAME, "pattern": f"^{NO_CONTROL}*$"},
    _parse_backoff: {"type": "string", "pattern": "^([0-9]{1,9}(,[0-9]{1,9}){0,31})?$"},
    _parse_key: {"type": "string", "minLength": 1, "maxLength": MAX_NAME},
    parse_own_headers: {"type": "object", "additionalProperties": TEXT},
}


def _described(parameter: Parameter) -> tuple[Schema, str]:
    parse: Any = parameter.parse
    return VALUES_OF_PARSERS.get(parse) or _whole(**parse.keywords), parameter.help


# All other parameters: their values and what they mean.  Where that depends on the endpoint, its
# name stands before.
OTHER_PARAMETERS: Mapping[str, tuple[Schema, str]] = {
    "seconds": (_whole(1, HISTORY_SECONDS), "how much of the history"),
    "info": (SWITCH, "describe each channel in full"),
    "list_channels n": (_whole(1, MAX_LISTED_CHANNELS), "channels at most, with info"),
    "list_channels after": (TEXT, "the channel before the first one to be listed, with info"),
    "like": (TEXT, "only channels in whose name this occurs, with info"),
    "order": ({"enum": [*CHANNEL_ORDERS]}, "order of the channels, with info"),
    "wait": (_whole(0, MAX_WAIT), f"seconds to wait for a message, {DEFAULT_WAIT} if not given"),
    "nowait": (SWITCH, "do not wait"),
    "take_message n": (_whole(1, MAX_BATCH), "messages at most, in a JSON array"),
    "as": (NAME, "name of the consumer, which looks at its messages in flight show"),
    "auto": (SWITCH, "delete the messages as they are delivered"),
    "ack": (_whole(), "id of a message to delete first"),
    "lease": (_whole(), "only if that delivery is the latest"),
    "msg": (TEXT, "the content, in place of a body"),
    "keep": (TEXT, "request headers to keep with the message, separated by commas"),
    "state": ({"enum": [*STATES]}, "only messages in this state"),
    "n": (_whole(1, MAX_BATCH), "messages at most"),
    "after": (_whole(), "id of the message before the first one to be listed"),
    "whole": (SWITCH, "do not cut bodies"),
    "list_dead_letters order": ({"enum": [*DEAD_ORDERS]}, "which come first"),
    "reason": ({"enum": [*DEAD_REASONS]}, "only those that died for this reason"),
    "channel": (NAME, "channel to which it posts"),
    "cron": (TEXT, "when: minute, hour, day, month, weekday; or as @daily"),
    "tz": (TEXT, "time zone of cron, UTC if not given"),
    "every": (_whole(1, MAX_EVERY), "seconds between two posts, in place of cron"),
    "catch-up": (SWITCH, "whether to post once for the times that were missed"),
    "since": (TEXT, "only what is kept after this id, of this age as 5m, or all"),
    **{f"set_topic_settings {p.name}": _described(p) for p in RETENTION_PARAMETERS},
    "for": (_whole(1), "seconds until the pause ends by itself"),
    "redrive n": (_whole(1), "messages at most"),
    "to": (NAME, "channel to move to, in place of where they came from"),
    "release_message delay": (COUNT, "seconds until it is ready again"),
    "uncounted": (SWITCH, "as if it had not been delivered"),
}

MESSAGE_SCHEMA = _object(
    {name: _whole() if kind is int else TEXT for name, kind in list(
        get_type_hints(Message).items())[:Message._fields.index("body") + 1]},
    encoding={"const": "base64"}, headers={"type": "object", "additionalProperties": TEXT},
)  # fmt: skip
ITEM = _object(
    {"body": {"type": "string", "minLength": 1}}, type=TEXT, encoding={"const": "base64"}
)
SCHEMAS: Mapping[str, Schema] = {
    "Error": _object({"error": TEXT}, index=COUNT),
    "Message": MESSAGE_SCHEMA,
    "Listed": {"allOf": [_named("Message"), _object({"state": TEXT}, cut=SWITCH)]},
    "Channel": _object({
        "channel": NAME,
        **dict.fromkeys(("ready", "delayed", "blocked", "in-flight", "waiting"), COUNT),
        "oldest": {"type": ["integer", "null"]}, "topics": NAMES, "patterns": NAMES,
        "paused": SWITCH, "settings": {"type": "object"}, "events": {"type": ["object", "null"]},
    }),
    "History": _object({
        "interval": COUNT, "time": _array({"type": "number"}),
        **{name: _array(_whole()) for name in SAMPLED},
    }),
}  # fmt: skip


def delivery_header(field: str) -> str:
    """The header that has a field of a message in the response with that message."""
    return "x-linger-" + ("msg-id" if field == "id" else field.replace("_", "-"))


DELIVERY_HEADERS = {
    delivery_header(name): {"schema": _whole() if kind is int else TEXT}
    for name, kind in {**get_type_hints(Message), "reply_to": str, "state": str}.items()
    if name not in ("type", "body", "header_lines")
}

PUBLISH_HEADERS = {
    PUBLICATION_HEADER: {
        "description": "If the topic keeps it: its id, or the first and the last one of a batch.",
        "schema": {"type": "string", "pattern": "^[0-9]+(-[0-9]+)?$"},
    },
    "x-linger-dropped": {
        "description": "Channels at their high-level mark, which got no copy.", "schema": TEXT,
    },
    "x-linger-dropped-count": {
        "description": "Their number, if their names do not fit.", "schema": COUNT,
    },
}  # fmt: skip


class Answer(NamedTuple):
    """What an endpoint answers, beside the errors that all may have."""

    status: int
    content: Union[Schema, Sequence[str], None] = None  # of JSON; or media types; or no body
    others: Sequence[int] = ()  # other statuses
    body: Optional[Schema] = None  # of the items of a request that has many
    headers: Mapping[str, Schema] = types.MappingProxyType({})


DELETION = {"anyOf": [_whole(), _object({"id": _whole()}, lease={"type": ["integer", "null"]})]}
ANSWERS: Mapping[str, Answer] = {
    **dict.fromkeys((
        "drain_channel", "set_settings", "change_settings", "clear_settings", "pause_channel",
        "resume_channel", "subscribe", "unsubscribe", "subscribe_pattern", "unsubscribe_pattern",
        "set_topic_settings", "clear_topic_settings", "delete_schedule",
    ), Answer(204)),
    **dict.fromkeys((
        "reply", "put_schedule", "change_message", "delete_message", "touch_message",
        "release_message", "reject_message", "redrive_message",
    ), Answer(204, None, (409,))),
    **dict.fromkeys((
        "describe_api", "get_stats", "get_settings", "get_topic_settings", "read_schedule",
    ), Answer(200, {"type": "object"})),
    "server_info": Answer(
        200, _object(dict.fromkeys(("Linger", "version", "id", "hostname"), TEXT))
    ),
    "get_access": Answer(200, _object({"rights": _array(TEXT), "restricted": SWITCH})),
    "check_health": Answer(200, _object({"healthy": SWITCH})),
    "get_source": Answer(200, ("text/x-python",), (304, 404)),
    "get_history": Answer(200, _named("History")),
    "get_metrics": Answer(200, ("text/plain",)),
    "open_backup": Answer(200, ("application/vnd.sqlite3",)),
    "list_channels": Answer(
        200, _object({"channels": _array({"anyOf": [NAME, _named("Channel")]})})
    ),
    "take_message": Answer(200, ("*/*",), (204, 404, 409), headers=DELIVERY_HEADERS),
    "post_message": Answer(202, _object({"id": COUNT}, duplicate=SWITCH)),
    "call": Answer(200, ("*/*",), (502, 504)),
    "await_end": Answer(204, None, (408,)),
    "post_batch": Answer(202, _object({"ids": _array(COUNT)}), body=ITEM),
    "list_messages": Answer(200, _array(_named("Listed")), (404,)),
    "get_channel_stats": Answer(200, _object({"ready": COUNT, "hidden": COUNT})),
    "get_info": Answer(200, _named("Channel")),
    **dict.fromkeys(("open_stream_channels", "open_stream"), Answer(200, (SSE, NDJSON))),
    "list_dead_letters": Answer(200, _array(_named("Listed"))),
    "redrive": Answer(200, _object({"moved": COUNT})),
    "list_channel_topics": Answer(200, _object({"topics": NAMES})),
    "list_channel_patterns": Answer(200, _object({"patterns": NAMES})),
    "list_patterns": Answer(200, _object({"patterns": NAMES})),
    "list_publications": Answer(200, _array({"type": "object"})),
    "list_topics": Answer(200, _object({"topics": NAMES})),
    "publish_message": Answer(202, {"type": "object"}, headers=PUBLISH_HEADERS),
    "publish_batch": Answer(202, {"type": "object"}, body=ITEM, headers=PUBLISH_HEADERS),
    "list_subscribers": Answer(
        200,
        _object({"channels": NAMES}, patterns={"type": "object", "additionalProperties": NAMES}),
    ),
    "list_schedules": Answer(200, _object({"schedules": _array({"type": "object"})})),
    "run_schedule": Answer(202, _object({"id": COUNT}, duplicate=SWITCH)),
    "read_message": Answer(200, ("*/*",), headers=DELIVERY_HEADERS),
    "delete_messages": Answer(
        200,
        _object(dict.fromkeys(("deleted", "conflict", "missing"), _array(_whole()))),
        body=DELETION,
    ),
}  # fmt: skip

# The parameters of other endpoints that an answer gives.
_POSTED, _LEASED = {"id": "$response.body#/id"}, {
    "id": "$response.header.x-linger-msg-id", "lease": "$response.header.x-linger-lease"
}  # fmt: skip
LINKS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "post_message": {
        "take_message": {"channel": "$request.path.channel"},
        **dict.fromkeys(
            ("read_message", "change_message", "redrive_message", "delete_message"), _POSTED
        ),
    },
    "put_schedule": {"run_schedule": {"name": "$request.path.name"}},
    "take_message": dict.fromkeys(
        ("touch_message", "release_message", "reject_message", "delete_message"), _LEASED
    ),
}


# What each status of an error means.
ERRORS: Mapping[int, str] = {
    **{status: kind.__doc__ or "" for status, kind in ERRORS_BY_STATUS.items()},
    401: "The token is missing or wrong.",
    405: "The path does not have this method.",
    408: "The request took too long to arrive.",
    414: "The target of the request is too long.",
    415: "The body has a type or a coding that the call does not understand.",
    417: "Only the expectation 100-continue is supported.",
    429: "This address has sent too many wrong tokens.",
    431: "The headers of the request are too long.",
    500: "A bug of the server, which is in its log.",
    502: "The message was given up.",
    501: "The method or transfer coding is not supported.",
    505: "The version of HTTP is not supported.",
}
WITHOUT_BODY = {204: "There is no message.", 304: "The client has it already."}
ERRORS_OF_CHANGES = (504, 507)
ERRORS_OF_SOME = (404, 405, 409, 502, *ERRORS_OF_CHANGES)


def _describe_parameter(endpoint: str, name: str) -> tuple[Schema, str]:
    """The values and the meaning of a parameter; KeyError if no table has it."""
    own = OTHER_PARAMETERS.get(f"{endpoint} {name}") or OTHER_PARAMETERS.get(name)
    if own is not None:
        return own
    return _described({p.name: p for p in (*CHANNEL_PARAMETERS, *ALL_PARAMETERS)}[name])


def _describe_parameters(route: Route) -> tuple[list[Schema], dict[str, Schema]]:
    """The parameters in path and query, and the latter as the properties of an object."""
    kinds = re.findall("<(.*?)>", route.path)
    listed: list[Schema] = [
        {"name": kind, "in": "path", "required": True, "schema": _whole() if kind == "id" else NAME}
        for kind in kinds
    ]
    properties = {}
    for name in PARAMETERS_OF.get(route.endpoint, ()):
        schema, help = _describe_parameter(route.endpoint, name)
        if schema.get("type") != "object":  # which only an item of a batch can be
            listed.append({"name": name, "in": "query", "description": help, "schema": schema})
            properties[name] = {**schema, "description": help}
    return listed, properties


def _describe_body(route: Route, properties: dict[str, Schema]) -> Optional[Schema]:
    """The body of the requests to a route; None if it has none."""
    values = {"type": "object", "properties": properties, "additionalProperties": FLAT}
    form = {"schema": values}
    if route.body == MANY:
        item = ANSWERS[route.endpoint].body or ANY
        items = {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_BATCH}
        content = {JSON_TYPE: {"schema": items}}
        if item is ITEM:
            content[NDJSON] = {"schema": TEXT}
        return {"required": True, "content": content}
    if route.body == CONTENT:
        content = {"application/octet-stream": {}, DEFAULT_TYPE: {"schema": TEXT}}
        return {"content": {**content, URLENCODED: form}}
    if route.method == "GET" or not properties:
        return None
    return {"content": {URLENCODED: form, JSON_TYPE: form}}


def _describe_answers(route: Route) -> dict[str, Schema]:
    """The answers of a route by status."""
    answer = ANSWERS[route.endpoint]
    statuses = {status for status in ERRORS if status not in ERRORS_OF_SOME}
    if not route.safe:
        statuses.update(ERRORS_OF_CHANGES)
    if "<id>" in route.path or "<name>" in route.path:
        statuses.add(404)
    error = {JSON_TYPE: {"schema": _named("Error")}}
    answers: dict[str, Schema] = {
        str(status): {"description": ERRORS[status], "content": error} if status in ERRORS
        else {"description": WITHOUT_BODY[status]}
        for status in sorted({*statuses, *answer.others})
    }  # fmt: skip
    links = LINKS.get(route.endpoint, {})
    success: Schema = {
        "description": route.summary,
        "headers": dict(answer.headers),
        "links": {op: {"operationId": op, "parameters": links[op]} for op in links},
    }
    if isinstance(answer.content, dict):
        success["content"] = {JSON_TYPE: {"schema": answer.content}}
    elif answer.content is not None:
        success["content"] = {media_type: {} for media_type in answer.content}
    return {str(answer.status): success, **answers}


def _describe_route(route: Route) -> Schema:
    parameters, properties = _describe_parameters(route)
    kind = route.path.split("/")[1] if route.endpoint == "open_stream" else ""
    right = {PUBLIC: "Needs no token.", AUTHENTICATED: "Needs any token."}
    described: Schema = {
        "operationId": f"{route.endpoint}_{kind}".rstrip("_"),
        "summary": route.summary,
        "description": right.get(route.right, f"Needs a token with the right `{route.right}`."),
        "parameters": parameters,
        "responses": _describe_answers(route),
    }
    body = _describe_body(route, properties)
    if body is not None:
        described["requestBody"] = body
    if route.right == PUBLIC:
        described["security"] = []
    return described


@functools.cache
def openapi_description() -> Schema:
    """The whole description."""
    paths: dict[str, Schema] = {}
    for route in ROUTES:
        path = route.path.replace("<", "{").replace(">", "}")
        paths.setdefault(path, {})[route.method.lower()] = _describe_route(route)
    schemes = {name: {"type": "http", "scheme": name} for name in ("bearer", "basic")}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Linger",
            "version": __version__,
            "description": "Message queue and pub-sub. README.md says what each call does.",
        },
        "servers": [{"url": "."}],
        "security": [{"bearer": []}, {"basic": []}, {}],
        "paths": paths,
        "components": {"schemas": SCHEMAS, "securitySchemes": schemes},
    }


# ---------------------------------------------------------------------------------------------
# API: the endpoints.  Each takes a request, calls the broker, and returns a response; what must
# wait for a commit asks the request's connection to reply later.  Knows nothing of bytes.
# ---------------------------------------------------------------------------------------------

HEADER_VALUE = re.compile(  # of at most MAX_TYPE characters
    f"[!-~\xa1-\xff](?:[ -~\xa1-\xff]{{0,{MAX_TYPE - 2}}}[!-~\xa1-\xff])?"
)
ITEM_BODY_OF = operator.itemgetter(0)  # of a BatchItem


def parse_array(body: bytes) -> list[Any]:
    """The items of a JSON array, which are numbers or objects, 1 to MAX_BATCH of them."""
    try:
        text = body.decode("utf-8")
        items = json.loads(text) if is_flat(text, nested=True) else None
    except ValueError:
        items = None
    if not isinstance(items, list):
        raise BadRequest(
            f"the body must be a JSON array of 1 to {MAX_BATCH} flat objects or numbers, in UTF-8"
        )
    return check_count(items)


def check_count(items: list[Any]) -> list[Any]:
    """The items of a batch themselves, unless there are none or too many."""
    if not items:
        raise BadRequest("the batch is empty")
    if len(items) > MAX_BATCH:
        raise TooLarge(f"the batch has {len(items)} items; the limit is {MAX_BATCH}")
    return items


def parse_batch(request: Request, table: Sequence[Parameter]) -> list[BatchItem]:
    """The messages of a batch, each with those parameters of a table that are given."""
    common = request.message_parameters(table)
    if request.headers.media_type == NDJSON:
        if request.body.count(b"\n") > MAX_BATCH_LINES:
            raise TooLarge(f"the batch has too many lines; the limit is {MAX_BATCH_LINES}")
        lines = check_count([line for line in map(bytes.strip, request.body.split(b"\n")) if line])
        return [(line, JSON_TYPE, _item_parameters(n, common)) for n, line in enumerate(lines)]
    if request.headers.media_type == JSON_TYPE:
        items = parse_array(request.body)
        messages = [parse_item(n, i, common) for n, i in enumerate(items)]
        given = set().union(*items)  # without what parse_item has taken out
        request.note_ignored(sorted(n for n in given if n.replace("_", "-") not in request.known))
        return messages
    raise LingerError(f"a batch must be {NDJSON} or {JSON_TYPE}", 415)


def _item_parameters(index: int, common: dict[str, str]) -> dict[str, str]:
    """The common parameters of a batch for one item.  A dedup key holds for the whole batch, so
    that sending it again adds nothing."""
    if "dedup" not in common:
        return common
    return {**common, "dedup": BatchKey(common["dedup"], index)}


def parse_item(index: int, item: Any, common: dict[str, str]) -> BatchItem:
    """One message of a batch in JSON; takes all but its parameters out of the item."""
    try:
        text = item.pop("body", None) if type(item) is dict else None
        if type(text) is not str:
            raise BadRequest("an item must be an object with a text `body`")
        content_type = item.pop("type", DEFAULT_TYPE) if item else DEFAULT_TYPE
        if type(content_type) is not str or not HEADER_VALUE.fullmatch(content_type):
            raise BadRequest("type must be a text fit for a header")
        encoding = item.pop("encoding", None) if item else None
        if encoding is None:
            body = text.encode("utf-8")
        elif encoding == "base64":
            body = base64.b64decode(text, validate=True)
        else:
            raise BadRequest("encoding must be base64, if it is given")
    except ValueError:
        error = BadRequest("body must be Unicode text, or base64 if encoding says so")
        error.index = index
        raise error from None
    except BadRequest as error:
        error.index = index
        raise
    if common:
        common = _item_parameters(index, common)
    if item:
        common = {**common, **{name: v for name, v in item.items() if v is not None}}
    return body, content_type, common


def done_response(_: Request, operation: Operation) -> Response:
    """The response for an operation without a result."""
    operation.result()
    return NO_CONTENT


def posted_response(_: Request, operation: Operation) -> Response:
    """The response for a post."""
    return post_result_response(operation.result())


def post_result_response(posted: PostResult) -> Response:
    """The response with the result of a post."""
    text = b'{"id":%d,"duplicate":true}\n' if posted.duplicate else b'{"id":%d}\n'
    return Response(202, text % posted.id)


def tagged_response(
    request: Request, body: bytes, etag: str, headers: str, content_type: str
) -> Response:
    """The response with a body that the client may have kept (RFC 9110 13.1.2)."""
    kept = request.headers.fields.get("if-none-match", "").replace("W/", "").split(",")
    if any(tag.strip(" \t") in (etag, "*") for tag in kept):
        return Response(304, headers=headers)
    return Response(200, body, content_type, headers)


@functools.cache
def own_source() -> tuple[bytes, str]:
    """The source of this program, and its entity tag; `NotFound` if it is not what runs."""
    try:
        with open(__file__, "rb") as file:
            if os.fstat(file.fileno()).st_ctime > LOADED_AT or not __file__.endswith(".py"):
                raise NotFound("linger.py was changed after it was loaded, or it is not there")
            body = file.read()
    except OSError:
        raise NotFound("linger.py is not there any more") from None
    return body, entity_tag(body)


def parse_wait(request: Request, default: int) -> int:
    """How many seconds a request may wait; `default` if it does not say."""
    wait = request.integer("wait", 0, MAX_WAIT)
    return default if wait is None else wait


class TakeOptions(NamedTuple):
    """The options of `GET /channels/<channel>` that do not name a message."""

    consumer: Consumer  # a take has another one of its kind
    n: Optional[int]  # None: one message, not in a JSON array
    wait: int
    has_ack: bool
    lease: Optional[int]


class ManagementApi:
    """The endpoints of `Administration`: the server, channels and topics, and what there is."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._broker = server.broker
        self._access = server.access
        self._memory = server.memory

    # -- what a token may see

    def _expected_channels(self, request: Request, *ids: int) -> Sequence[Optional[str]]:
        """The channel in which each message must be, so that an id alone gives no access.

        None is any channel.  A message that the token does not cover is expected in "", where no
        message can be, so it is as if it did not exist.
        """
        grant = request.grant
        if grant.channels is None:
            return [None] * len(ids)
        channels = self._broker.channels_of(ids)
        names = (channels.get(id, "") for id in ids)
        return [name if name and grant.covers("channels", name) else "" for name in names]

    def _expected_channel(self, request: Request, id: int) -> Optional[str]:
        """The same for one message."""
        if request.grant.channels is None:
            return None
        return self._expected_channels(request, id)[0]

    def _visible_names(self, request: Request, kind: str, names: Iterable[str]) -> Response:
        """The response with those of the channels, topics or patterns that a token covers."""
        return json_response({kind: request.grant.visible(kind, names)})

    def _check_dead_channel(self, request: Request, parameters: Mapping[str, object]) -> None:
        """`AccessDenied` if a message could reach a channel to which it may not be posted."""
        dead = parameters.get("dead")
        if isinstance(dead, str) and dead:
            request.grant.check_name("channels", dead)

    def _checked_parameters(self, request: Request, table: Sequence[Parameter]) -> dict[str, Any]:
        """The parameters of a table that are given; `AccessDenied` for a foreign dead channel."""
        parameters = request.parameters(table)
        self._check_dead_channel(request, parameters)
        return parameters

    # -- the server

    def server_info(self, _: Request, *__: str) -> Response:
        return json_response(
            {
                "Linger": "Welcome",
                "version": __version__,
                "id": self._broker.id,
                "hostname": socket.gethostname(),
            },
            headers=VARY,
        )

    def show_page(self, request: Request) -> Response:
        return tagged_response(request, *page(), "text/html; charset=utf-8")

    def get_source(self, request: Request, *_: str) -> Response:
        body, etag = own_source()
        headers = f"Cache-Control: no-cache\r\nETag: {etag}\r\n"
        return tagged_response(request, body, etag, headers, "text/x-python; charset=utf-8")

    def get_access(self, request: Request) -> Response:
        grant = request.grant
        rights = [right for right in RIGHTS if right in grant.rights]
        restricted = grant.channels is not None
        return json_response({"rights": rights, "restricted": restricted})

    def check_health(self, _: Request) -> Response:
        try:
            self._broker.check_health()
        except Full as error:
            raise Unavailable(str(error)) from error
        return json_response({"healthy": True})

    def describe_api(self, _: Request, *__: str) -> Response:
        return json_response(openapi_description())

    def get_stats(self, _: Request) -> Response:
        connections = len(self._server.connections)
        return json_response({**self._broker.stats(), "current-connections": connections})

    def get_history(self, request: Request, _: str) -> Response:
        seconds = request.integer("seconds", 1, HISTORY_SECONDS) or HISTORY_SECONDS
        return json_response(self._broker.statistics.history(seconds))

    def get_metrics(self, _: Request) -> Response:
        with self._memory.large_work:
            return Response(200, metrics_page(self._server), METRICS_TYPE)

    def open_backup(self, _: Request) -> Response:
        copy = self._broker.open_copy()
        return Response(200, type="application/vnd.sqlite3", undo=copy.close, file=copy)

    # -- channels and topics

    def list_channels(self, request: Request) -> Response:
        if not request.switch("info"):
            return self._visible_names(request, "channels", self._broker.channels())
        channels = self._broker.list_channels(
            request.integer("n", 1, MAX_LISTED_CHANNELS),
            request.parameter("after") or "",
            request.parameter("like") or "",
            request.parameter("order") or "name",
            functools.partial(request.grant.covers, "channels"),
        )
        infos = [self._visible_info(request, info) for info in self._broker.infos(channels)]
        return json_response({"channels": infos})

    def get_info(self, request: Request, channel: str) -> Response:
        return json_response(self._visible_info(request, self._broker.info(channel)))

    def _visible_info(self, request: Request, info: dict[str, Any]) -> dict[str, Any]:
        visible = {kind: request.grant.visible(kind, info[kind]) for kind in ("topics", "patterns")}
        return {**info, **visible}

    def get_channel_stats(self, _: Request, channel: str) -> Response:
        return json_response(self._broker.channel_stats(channel))

    def list_messages(self, request: Request, channel: str) -> Response:
        whole = request.switch("whole")
        state, after = request.parameter("state") or None, request.integer("after")
        if state == "ready" and after is not None and self._expected_channel(request, after) == "":
            raise NotFound(f"there is no message {after}")  # the listing would reveal its place
        cut = None if whole else PREVIEW_BYTES
        read = self._broker.list_whole if whole else self._broker.list_messages
        return self._listing(request, cut, lambda n: read(channel, state, n, after))

    def list_dead_letters(self, request: Request) -> Response:
        after, reason = request.integer("after"), request.parameter("reason") or ""
        order, read = request.parameter("order") or "newest", self._broker.dead_letters
        return self._listing(request, PREVIEW_BYTES, lambda n: read(n, after, reason, order))

    def _listing(
        self,
        request: Request,
        cut: Optional[int],
        read: Callable[[int], Iterable[tuple[Any, ...]]],
        to_object: Callable[..., Mapping[str, object]] = listed_object,
    ) -> Response:
        """The response with the messages that `read(n)` returns, n at most, each with what else
        `to_object` is called with."""
        n = request.integer("n", 1, MAX_BATCH) or LISTED
        output, asked = request.connection.output, time.monotonic()
        with self._memory.large_work:
            if time.monotonic() > asked + GONE_AFTER and request.connection.is_disconnected():
                raise Unavailable("the client has gone, or the server has too much to do")
            output.resize(self._most_of_listing(n, cut))
            array = JsonArray(read(n), lambda *item: TO_JSON(to_object(*item, cut=cut)))
            output.force(array.size)
        return Response(200, array=array)

    def _most_of_listing(self, n: int, cut: Optional[int]) -> int:
        """The most bytes that a listing of `n` messages keeps."""
        largest = self._broker.max_message if cut is None else cut
        bodies = min(n * largest, MAX_BATCH_BYTES + largest)
        return bodies + n * MESSAGE_BYTES + JSON_EXPANSION * largest

    def read_message(self, request: Request, id: int) -> Response:
        message, state = self._broker.read_message(id)
        if not request.grant.covers("channels", message.channel):
            raise NotFound(f"there is no message {message.id}")
        headers = message_headers(message, request, f"x-linger-state: {state}\r\n")
        return Response(200, message.body, type_in_header(message.type), headers)

    def drain_channel(self, _: Request, channel: str) -> Response:
        self._broker.drain(channel)
        return NO_CONTENT

    def get_settings(self, _: Request, channel: str) -> Response:
        return json_response(self._broker.settings(channel))

    def set_settings(self, request: Request, channel: str) -> Response:
        parameters = self._checked_parameters(request, CHANNEL_PARAMETERS + SINGLE_PARAMETERS)
        self._broker.set_settings(channel, **parameters)
        return NO_CONTENT

    def change_settings(self, request: Request, channel: str) -> Response:
        parameters = self._checked_parameters(request, CHANNEL_PARAMETERS + SINGLE_PARAMETERS)
        self._broker.change_settings(channel, **parameters)
        return NO_CONTENT

    def clear_settings(self, _: Request, channel: str) -> Response:
        self._broker.clear_settings(channel)
        return NO_CONTENT

    def pause_channel(self, request: Request, channel: str) -> Response:
        self._broker.pause(channel, request.integer("for", 1))
        return NO_CONTENT

    def resume_channel(self, _: Request, channel: str) -> Response:
        self._broker.resume(channel)
        return NO_CONTENT

    def redrive(self, request: Request, channel: str) -> Response:
        to = request.parameter("to")
        self._check_target(request, to)
        moved = self._broker.redrive(channel, request.integer("n", 1), to)
        return json_response({"moved": moved})

    def _check_target(self, request: Request, to: Optional[str]) -> None:
        """`AccessDenied` unless a token may have messages moved to a channel."""
        if request.grant.channels is not None:
            if to is None:
                raise AccessDenied("a restricted token must name the target: to=<channel>")
            request.grant.check_name("channels", to)

    def redrive_message(self, request: Request, id: int) -> Response:
        to = request.parameter("to")
        self._check_target(request, to)
        self._broker.redrive_message(id, to, self._expected_channel(request, id))
        return NO_CONTENT

    def change_message(self, request: Request, id: int) -> Response:
        parameters = self._checked_parameters(request, CHANGE_PARAMETERS)
        self._broker.change(id, self._expected_channel(request, id), **parameters)
        return NO_CONTENT

    def list_channel_topics(self, request: Request, channel: str) -> Response:
        return self._visible_names(request, "topics", self._broker.topics(channel))

    def subscribe(self, request: Request, channel: str, topic: str) -> Response:
        parameters = self._checked_parameters(request, ALL_PARAMETERS)
        since = request.parameter("since")
        if since is None:
            self._broker.subscribe(channel, topic, **parameters)
        else:
            self._broker.retention.subscribe(channel, topic, since, **parameters)
        return NO_CONTENT

    def unsubscribe(self, _: Request, channel: str, topic: str) -> Response:
        self._broker.unsubscribe(channel, topic)
        return NO_CONTENT

    def list_channel_patterns(self, request: Request, channel: str) -> Response:
        return self._visible_names(request, "patterns", self._broker.patterns.names(channel))

    def subscribe_pattern(self, request: Request, channel: str, pattern: str) -> Response:
        parameters = self._checked_parameters(request, ALL_PARAMETERS)
        if request.parameter("since") is not None:
            raise BadRequest(
                "since belongs to a topic, which may keep publications: subscribe to it"
            )
        self._broker.patterns.subscribe(channel, pattern, **parameters)
        return NO_CONTENT

    def unsubscribe_pattern(self, _: Request, channel: str, pattern: str) -> Response:
        self._broker.patterns.unsubscribe(channel, pattern)
        return NO_CONTENT

    def get_topic_settings(self, _: Request, topic: str) -> Response:
        return json_response(self._broker.retention.settings(topic))

    def set_topic_settings(self, request: Request, topic: str) -> Response:
        keep, keep_for = request.integer("keep", 1, MAX_KEPT), request.integer("keep-for", 1)
        self._broker.retention.put(topic, keep, keep_for)
        return NO_CONTENT

    def clear_topic_settings(self, _: Request, topic: str) -> Response:
        self._broker.retention.clear(topic)
        return NO_CONTENT

    def list_publications(self, request: Request, topic: str) -> Response:
        since, retention = request.parameter("since") or "all", self._broker.retention
        cut = None if request.switch("whole") else PREVIEW_BYTES
        read = retention.kept_whole if cut is None else retention.kept
        return self._listing(request, cut, lambda n: zip(read(topic, since, n)), publication_object)

    def list_patterns(self, request: Request) -> Response:
        return self._visible_names(request, "patterns", self._broker.patterns.names())

    def list_topics(self, request: Request) -> Response:
        return self._visible_names(request, "topics", self._broker.topics())

    def list_subscribers(self, request: Request, topic: str) -> Response:
        grant, found = request.grant, self._broker.pattern_subscribers(topic)
        channels = grant.visible("channels", self._broker.subscribers(topic))
        shown = {
            pattern: names
            for pattern in grant.visible("patterns", found)
            if (names := grant.visible("channels", found[pattern]))
        }
        return json_response({"channels": channels, **({"patterns": shown} if shown else {})})

    # -- schedules

    def list_schedules(self, request: Request) -> Response:
        schedules = self._broker.schedules.read_all(PREVIEW_BYTES)
        shown = [s for s in schedules if request.grant.covers("channels", s.channel)]
        objects = [self._schedule_object(schedule, PREVIEW_BYTES) for schedule in shown]
        return json_response({"schedules": objects})

    def read_schedule(self, request: Request, name: str) -> Response:
        return json_response(self._schedule_object(self._visible_schedule(request, name)))

    def _visible_schedule(self, request: Request, name: str) -> Schedule:
        """A schedule; `NotFound` also if the token does not cover its channel."""
        schedule = self._broker.schedules.read(name)
        if not request.grant.covers("channels", schedule.channel):
            raise NotFound(f"there is no schedule {name}")
        return schedule

    def _schedule_object(self, schedule: Schedule, cut: Optional[int] = None) -> dict[str, object]:
        return schedule_object(schedule, *self._broker.schedules.next_due(schedule), cut)

    def put_schedule(self, request: Request, name: str) -> Response:
        body, content_type = request.message()
        parameters = request.message_parameters(SCHEDULE_PARAMETERS)
        parameters.pop("dedup", None)  # an Idempotency-Key, which a PUT does not need
        channel, catch_up = request.parameter("channel"), request.parameter("catch-up")
        if channel is None:
            raise BadRequest("channel must name the channel to which the schedule posts")
        request.grant.check_name("channels", channel)
        self._check_dead_channel(request, parameters)
        expected = None
        if request.grant.channels is not None:
            with contextlib.suppress(NotFound):
                expected = self._broker.schedules.read(name).channel
                request.grant.check_name("channels", expected)
        self._broker.schedules.put(
            name, channel, body, content_type, request.parameter("cron"),
            request.parameter("tz"), request.integer("every", 1, MAX_EVERY),
            catch_up is None or request.switch("catch-up"), expected, **parameters,
        )  # fmt: skip
        return NO_CONTENT

    def delete_schedule(self, request: Request, name: str) -> Response:
        self._broker.schedules.remove(name, self._visible_schedule(request, name).channel)
        return NO_CONTENT

    def run_schedule(self, request: Request, name: str) -> Response:
        channel = self._visible_schedule(request, name).channel
        return post_result_response(self._broker.schedules.post(name, channel))


class Api(ManagementApi):
    """The endpoints of a server, one method each; stateless, and called by all connections.

    An endpoint takes the request, and the names or the id in its path.  It returns the response, or
    None after `request.connection.defer`: then the thread that commits the operation replies.
    """

    # -- before the body is read

    def admit(self, request: Request) -> int:
        """Checks the headers of a request; returns how many bytes its body may have.

        The result is kept in the request, for the next one with the same head.
        """
        if request.grants is not self._access.grants:
            self._identify(request)
            request.body_limit = self._body_limit(request)
        return request.body_limit

    def _identify(self, request: Request) -> None:
        """Finds the grant of a request; `AccessDenied` if it has none, or for a foreign page."""
        headers, grants = request.headers, self._access.grants
        if request.routes is PAGE_ROUTES:  # static: a link on any site may lead to it
            self._access.check_host(headers.fields.get("host", ""))
            request.grant, request.grants = NO_ACCESS, grants
            return
        if headers.cors_headers is None:
            headers.cors_headers = self._access.check_origin(headers.fields)
        request.base_headers = headers.cors_headers
        request.endpoint = None
        grant = self._access.identify(headers.fields.get("authorization"))
        if grant is None:
            self._handle_unauthenticated(request)
        else:
            request.grant, request.grants = grant, grants

    def _handle_unauthenticated(self, request: Request) -> None:
        """Admits what needs no token; otherwise `AccessDenied`, delayed after many failures."""
        request.grant = NO_ACCESS
        route = request.routes.get("GET" if request.method == "HEAD" else request.method)
        preflight = request.method == "OPTIONS" and PREFLIGHT in request.base_headers
        if preflight or (route is not None and route.right == PUBLIC):
            return
        throttle, delay = self._access.throttle, 0.0
        if "authorization" in request.headers.fields:
            delay = throttle.record_failure(request.connection.address)
        if delay:
            if not throttle.slots.acquire(blocking=False):
                retry = f"Retry-After: {AUTH_FAILURE_WINDOW:.0f}\r\n"
                raise LingerError("this address has sent too many wrong tokens", 429, retry)
            try:
                self._server.await_stop(delay)
            finally:
                throttle.slots.release()
        is_script = "x-requested-with" in request.headers.fields  # a browser must not ask for it
        challenge = BEARER_CHALLENGE if is_script else CHALLENGE
        reason = "a valid token is needed: `Authorization: Bearer <token>`"
        raise AccessDenied(reason, 401, challenge)

    def _body_limit(self, request: Request) -> int:
        route = request.routes.get(request.method)
        kind = CONTENT if request.method == "POST" else PARAMETERS
        if route is not None:
            kind = route.body
        if kind == PARAMETERS:
            return FORM_SLACK
        if kind == MANY:
            return MAX_BATCH_BYTES
        if request.headers.is_form:
            return self._broker.max_message * FORM_EXPANSION + FORM_SLACK
        return self._broker.max_message

    # -- dispatch

    def find_endpoint(self, request: Request) -> Callable[..., Optional[Response]]:
        """The method for a request, which then may call it: the rights have been checked.

        The result is kept in the request, as `endpoint` and `names`.
        """
        if request.method == "OPTIONS":
            return self.list_methods
        route = find_route(request.method, request.routes)
        if route.safe:
            request.connection.yield_to_simultaneous()
            request.base_headers = request.headers.cors_headers or ""
        else:
            self._access.check_browser(request.headers.fields)
            request.base_headers = NO_STORE + (request.headers.cors_headers or "")
        refused = REFUSED.get(route.endpoint, ())
        request.recognize((*PARAMETERS_OF.get(route.endpoint, ()), *refused), route.body)
        segments, kinds = request.segments[1::2], request.segments[::2]
        if route.endpoint == "take_message":
            segments = segments[0].split(",")
            kinds *= len(segments)
        elif kinds[0] == "channels" and segments and "," in segments[0]:
            raise BadRequest(
                "a comma separates channels, in GET /channels/<a>,<b> only: in a name, write %2C"
            )
        names = [decode_name(segment) for segment in segments]
        if request.grant is not FULL_ACCESS:
            authorize(route, kinds, names, request.grant)
        is_message = "<id>" in route.path
        request.names = [parse_integer("id", id) for id in names] if is_message else names
        request.endpoint = getattr(self, route.endpoint)
        return request.endpoint

    def list_methods(self, request: Request, *_: str) -> Response:
        server_wide = request.target == "*"
        allowed = ", ".join(KNOWN_METHODS) if server_wide else allowed_methods(request.routes)
        return Response(204, headers=f"Allow: {allowed}\r\n")

    # -- consuming and producing

    def take_message(self, request: Request, *channels: str) -> None:
        # Some may stand in a form, and a chunked body is not part of the head that is seen again.
        if request.options is None or request.body or request.headers.chunked:
            request.options = self._take_options(request, channels)
        kind, _, wait, has_ack, lease = request.options
        ack = request.integer("ack") if has_ack else None
        consumer = kind.again()
        expected_channel = None if ack is None else self._expected_channel(request, ack)
        on_done = request.connection.defer(request, self._taken_response, consumer, wait)
        self._broker.take_async(on_done, consumer, wait, ack, lease, expected_channel)

    def _take_options(self, request: Request, channels: Sequence[str]) -> TakeOptions:
        connection, wait = request.connection, parse_wait(request, DEFAULT_WAIT)
        if request.switch("nowait") or not wait:
            wait = 0
            connection.yield_to_simultaneous()
        n, timeout = request.integer("n", 1, MAX_BATCH), request.integer("timeout", 1)
        auto, has_ack = request.switch("auto"), request.parameter("ack") is not None
        lease = request.integer("lease")
        holder = check_name("consumer", request.parameter("as") or connection.address)
        is_disconnected, memory = connection.is_disconnected, connection.output
        consumer = self._broker.consumer(
            channels, n or 1, timeout, auto, is_disconnected, memory, holder
        )
        return TakeOptions(consumer, n, wait, has_ack, lease)

    def _taken_response(self, request: Request, operation: Operation) -> Response:
        messages, consumer = operation.result(), operation.owner
        if not messages:
            names = consumer.channels
            if len(names) == 1:
                return Response(204, headers=f"x-linger-channel: {encode_name(names[0])}\r\n")
            header = list_header("x-linger-channel", names, request.header_room())
            return Response(204, headers=header)
        if request.options.n is not None:
            return self._batch_response(request, consumer, messages)
        undo = functools.partial(self._broker.undo_take, consumer, messages)
        message = messages[0]
        headers = message_headers(message, request)
        return Response(200, message.body, type_in_header(message.type), headers, undo)

    def _batch_response(
        self, request: Request, consumer: Consumer, messages: Sequence[Message]
    ) -> Response:
        """The response with the messages of a take; outside of the committer if they are large."""
        output = request.connection.output
        taken = list(map(TAKEN_OF, messages))  # without bodies, which go as they are sent
        undo = functools.partial(self._broker.undo_taken, consumer, taken)
        if output.size <= SMALL_AMOUNT:
            text = f"[{','.join(map(message_json, messages))}]\n"
            return Response(200, text.encode(), undo=undo)
        with self._memory.large_work:
            array = JsonArray(zip(messages), message_json)
        output.force(array.size)
        return Response(200, undo=undo, array=array)

    def post_message(self, request: Request, channel: str) -> None:
        body, content_type = request.message()
        parameters = request.message_parameters(ALL_PARAMETERS)
        if "dead" in parameters:
            self._check_dead_channel(request, parameters)
        on_done = request.connection.defer(request, posted_response)
        self._broker.post_async(on_done, channel, body, content_type, **parameters)

    @contextlib.contextmanager
    def _waiting(self, request: Request) -> Iterator[Callable[[], bool]]:
        """Counts a request as a waiting consumer; yields what says whether its client has gone."""
        request.connection.start_waiting()
        try:
            yield request.connection.is_disconnected
        finally:
            self._server.release_consumer(request.connection)

    def call(self, request: Request, channel: str) -> Response:
        body, content_type = request.message()
        parameters = request.message_parameters(ALL_PARAMETERS)
        wait = parse_wait(request, CALL_WAIT)
        self._check_dead_channel(request, parameters)
        with self._waiting(request) as is_disconnected:
            reply, reply_type = self._broker.calls.call(
                channel, body, content_type, wait, is_disconnected, **parameters
            )
        return Response(200, reply, type_in_header(reply_type), SANDBOX)

    def reply(self, request: Request, id: int) -> Response:
        lease = request.integer("lease")
        body, content_type = request.message()
        expected_channel = self._expected_channel(request, id)
        self._broker.calls.reply(id, body, content_type, lease, expected_channel)
        return NO_CONTENT

    def await_end(self, request: Request, channel: str) -> Response:
        wait = parse_wait(request, DEFAULT_WAIT)
        with self._waiting(request) as is_disconnected:
            is_empty = self._broker.calls.drained(channel, wait, is_disconnected)
        if not is_empty:
            raise LingerError(f"the channel still holds messages after {wait} seconds", 408)
        return NO_CONTENT

    def post_batch(self, request: Request, channel: str) -> Response:
        messages = self._parse_batch(request, ALL_PARAMETERS)
        for _, _, parameters in messages:
            if "dead" in parameters:
                self._check_dead_channel(request, parameters)
        return json_response({"ids": self._broker.post_batch(channel, messages)}, 202)

    def _parse_batch(self, request: Request, table: Sequence[Parameter]) -> list[BatchItem]:
        """The messages of a batch; frees its text, and reserves memory for what they need beside
        their bodies."""
        is_large = len(request.body) > SMALL_AMOUNT
        with self._memory.large_work if is_large else contextlib.nullcontext():
            messages = parse_batch(request, table)
        request.release_body()
        size = sum(map(len, map(ITEM_BODY_OF, messages))) + len(messages) * MESSAGE_BYTES
        request.connection.input.resize(size)
        return messages

    def publish_message(self, request: Request, topic: str) -> Response:
        parameters = request.message_parameters(SINGLE_PARAMETERS)
        body, content_type = request.message()
        ids, dropped, duplicate, id = self._broker.publication(
            topic, body, content_type, **parameters
        )
        publication = str(id) if id else ""
        return self._published_response(request, ids, dropped, publication, duplicate)

    def publish_batch(self, request: Request, topic: str) -> Response:
        messages = self._parse_batch(request, SINGLE_PARAMETERS)
        ids, dropped, kept = self._broker.publish_batch(topic, messages)
        publications = f"{kept[0]}-{kept[-1]}" if kept else ""
        return self._published_response(request, ids, dropped, publications)

    def _published_response(
        self,
        request: Request,
        ids: Mapping[str, object],
        dropped: Sequence[str],
        publications: str,
        duplicate: bool = False,
    ) -> Response:
        """The response with what became of a publication in the channels that the token covers."""
        header = f"{PUBLICATION_HEADER}: {publications}\r\n" if publications else ""
        if visible := request.grant.visible("channels", dropped):
            header += list_header("x-linger-dropped", visible, request.header_room())
        answer = {channel: ids[channel] for channel in request.grant.visible("channels", ids)}
        if duplicate:
            answer["duplicate"] = True
        return json_response(answer, 202, header)

    def open_stream_channels(self, request: Request, channel: str) -> Response:
        if request.parameter("since") is not None:
            raise BadRequest("since is for the streams of topics, which may keep publications")
        return self._stream(request, channel, lambda listen: listen())

    def open_stream(self, request: Request, name: str) -> Response:
        """The events of topics, first those that are kept if a browser connects again, or the
        request says so.

        The id of the last event wins: a browser sends it with the URL that it was first given.
        """
        kind, since = request.segments[0], request.parameter("since")
        last_id = request.headers.fields.get("last-event-id", "")
        if re.fullmatch("[0-9]{1,18}", last_id):
            since = last_id
        replay = functools.partial(self._broker.retention.replay, kind, name, since)
        return self._stream(request, name, replay)

    def _stream(
        self,
        request: Request,
        name: str,
        to_reader: Callable[[Callable[[], Reader]], Union[Reader, Replay]],
    ) -> Response:
        """The response with events; `to_reader` makes their reader of a function that listens."""
        headers = f"{NO_STORE}X-Accel-Buffering: no\r\n"  # which lets nginx send events at once
        if request.method == "HEAD":
            return Response(200, headers=headers, stream=EventStream(request))
        request.close_after = True
        request.connection.start_waiting()
        kind, connection = request.segments[0], request.connection
        listen = functools.partial(self._broker.listen, kind, name, connection, self._memory)
        reader = to_reader(listen)
        stream = EventStream(request, reader, lambda: self._is_allowed(request))
        return Response(200, headers=headers, undo=reader.close, stream=stream)

    def _is_allowed(self, request: Request) -> bool:
        """Whether a request may still be made, after tokens may have been read again."""
        if request.grants is self._access.grants:
            return True
        try:
            self.admit(request)
            self.find_endpoint(request)
        except LingerError:
            return False
        return True

    # -- acknowledging

    def delete_message(self, request: Request, id: int) -> None:
        lease, expected_channel = request.integer("lease"), self._expected_channel(request, id)
        on_done = request.connection.defer(request, done_response)
        self._broker.delete_async(on_done, id, lease, expected_channel)

    def delete_messages(self, request: Request, _: str) -> Response:
        wanted: dict[int, Optional[int]] = {}
        for item in parse_array(request.body):
            id, lease = (item.get("id"), item.get("lease")) if type(item) is dict else (item, None)
            lease = None if lease is None else parse_integer("lease", lease)
            wanted[parse_integer("id", id)] = lease
        expected_channels = dict(zip(wanted, self._expected_channels(request, *wanted)))
        results = self._broker.delete_batch(list(wanted.items()), expected_channels)
        return json_response(dict(zip(("deleted", "conflict", "missing"), results)))

    def touch_message(self, request: Request, id: int) -> Response:
        lease, timeout = request.integer("lease"), request.integer("timeout", 1)
        self._broker.touch(id, lease, timeout, self._expected_channel(request, id))
        return NO_CONTENT

    def release_message(self, request: Request, id: int) -> Response:
        lease, delay = request.integer("lease"), request.integer("delay", 0)
        reason, uncounted = request.reason(), request.switch("uncounted")
        expected_channel = self._expected_channel(request, id)
        self._broker.release(id, lease, delay, reason, expected_channel, uncounted)
        return NO_CONTENT

    def reject_message(self, request: Request, id: int) -> Response:
        lease, reason = request.integer("lease"), request.reason()
        self._broker.reject(id, lease, reason, self._expected_channel(request, id))
        return NO_CONTENT


# ---------------------------------------------------------------------------------------------
# Connections: a thread each, which reads requests and sends responses.  Knows nothing of what the
# requests ask for.
#
# The pending reply.  What must wait for a commit calls `Connection.defer`, and the committer
# thread replies.  The connection's thread meanwhile receives: so it need not be woken for each
# reply, it notices a disconnect, and it ends the wait of a consumer in time.  `ReplySlot` is the
# state that both threads share.  POST, GET and DELETE of a message:
#   1. `_serve_request` reads the request, and calls its endpoint.
#   2. The endpoint calls `defer`, which makes a reply pending, and then the broker's `post_async`,
#      `take_async` or `delete_async`, which submits a `Post`, `Take` or `Delete`.
#   3. The connection's thread is back in `_await_data`.  It handles no other request until
#      `_await_reply` says that no reply is pending.
#   4. The committer runs the statements and commits (see Commits).  A `Take` that finds nothing
#      is put on the waiting list.  The next `Post` to its channel takes for it, in its own
#      transaction: `Post.on_executed` calls `State.wake`.
#   5. The committer calls `_reply`: it renders the response and sends it, without blocking; a
#      large response is left to a new thread (`_reply_large`).  At the deadline of a wait, or when
#      the client disconnects, `_await_reply` cancels the consumer, and so calls `_reply` itself.
#   6. What the socket does not take at once is sent by a new thread (`_finish_reply`).  A delivery
#      that cannot be sent is undone, and counts as if not made.
#   7. `_complete_reply` ends the pending reply.
# ---------------------------------------------------------------------------------------------

ToResponse = Callable[[Request, Operation], Response]  # of a finished operation
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MSG_DONTWAIT: int = getattr(socket, "MSG_DONTWAIT", 0)  # not on Windows
POLLRDHUP: int = getattr(select, "POLLRDHUP", 0)  # Linux only: the client has closed its end
DISCONNECT_EVENTS = POLLRDHUP | select.POLLHUP | select.POLLERR if IS_POSIX else 0


def timeval_format(connection: socket.socket) -> str:
    """The `struct` format of the kernel's timeval, as SO_RCVTIMEO has it.

    Its fields need not be of the size of a C long: with musl on 32 bits both have 64.
    """
    size = len(connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
    return "@ll" if size == struct.calcsize("@ll") else "=qq" if size == 16 else "=ii"


class PlainStream:
    """The bytes of a connection without TLS.

    The socket blocks, and the kernel keeps the timeouts: BlockingIOError when one has passed.
    That is one system call less for each receive than to poll first.
    """

    is_shared = False  # whether receiving and sending exclude each other

    def __init__(self, connection: socket.socket, timeval: str) -> None:
        self.receive: Callable[[int], bytes] = connection.recv
        """The next bytes, up to so many; empty at the end of the stream."""
        self.timeout = 0.0  # how long `receive` and `peek` may block, seconds
        self._socket = connection
        self._timeval = timeval
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send_timeout = struct.pack(timeval, SEND_TIMEOUT, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, send_timeout)

    def set_timeout(self, seconds: float) -> None:
        """Sets how long `receive` and `peek` may block."""
        self.timeout, whole = seconds, int(seconds)
        timeval = struct.pack(self._timeval, whole, max(int((seconds - whole) * 1e6), 1))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)

    def peek(self) -> bool:
        """Waits until something can be received; False if that is the end of the stream."""
        return bool(self._socket.recv(1, socket.MSG_PEEK))

    def send(self, data: bytes) -> None:
        """Sends all bytes."""
        self.send_encoded(data)

    def send_at_once(self, data: bytes) -> bytes:
        """Sends what can be sent without blocking; the rest is for `send_encoded`."""
        try:
            sent = self._socket.send(data, MSG_DONTWAIT)
        except OSError:
            return data
        return data[sent:]

    def send_encoded(self, data: bytes) -> None:
        """Sends all bytes, which are as they shall be on the wire."""
        view = memoryview(data)
        for start in range(0, len(data), SEND_CHUNK):
            chunk = view[start : start + SEND_CHUNK]
            if self._socket.send(chunk) < len(chunk):  # SO_SNDTIMEO passed after a part of it
                raise TimeoutError

    def end(self) -> None:
        """Says to the other side that nothing more comes, where the protocol has a way to."""

    def is_ready(self, events: int) -> bool:
        """Whether any of the events of `select.poll` is there now."""
        poller = select.poll()
        try:
            poller.register(self._socket, events)
        except ValueError:
            return True  # closed by this server
        return bool(poller.poll(0))

    def is_disconnected(self) -> bool:
        """Whether the client has closed its end, or the connection is broken."""
        if self.is_ready(DISCONNECT_EVENTS):
            return True
        if POLLRDHUP:
            return False
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True


class TlsStream(PlainStream):
    """The bytes of a connection with TLS, server side.

    They pass through memory, so that the socket stays a plain one with the kernel's timeouts.
    OpenSSL's state is not for two threads at a time, so a thread that waits for bytes while
    another may send must `peek` first.
    """

    is_shared = True

    def __init__(self, connection: socket.socket, timeval: str, context: ssl.SSLContext) -> None:
        super().__init__(connection, timeval)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    def handshake(self) -> bool:
        """Takes the handshake further; returns whether it is complete.  OSError if it fails."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        finally:
            self._flush()  # an alert, if it failed
        self.receive = self._receive  # refers to this stream until `end`
        return True

    def feed(self, data: bytes) -> None:
        """Takes what was received by `PlainStream.receive`; empty at the end of the stream."""
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _receive(self, size: int) -> bytes:
        """The next bytes; SSLWantReadError when only a part of a record has come."""
        try:
            try:
                return self._tls.read(size)
            except ssl.SSLWantReadError:
                data = self._socket.recv(RECEIVE_SIZE)
                if not data:  # to OpenSSL that is an error, and it sends an alert
                    return b""
                self.feed(data)
                return self._tls.read(size)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""
        finally:
            self._flush()

    def peek(self) -> bool:
        return self._tls.pending() > 0 or self._incoming.pending > 0 or super().peek()

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(data), SEND_CHUNK):  # what is encrypted needs memory as well
            self._tls.write(view[start : start + SEND_CHUNK])
            self.send_encoded(self._outgoing.read())

    def send_at_once(self, data: bytes) -> bytes:
        self._tls.write(data)
        return super().send_at_once(self._outgoing.read())

    def end(self) -> None:
        self.receive = self._socket.recv  # what still comes is only to be discarded
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self.send_encoded(self._outgoing.read())


def undo_unsent(response: Response) -> None:
    """Undoes what a response says, since it cannot be sent."""
    if response.undo is not None:
        try:
            response.undo()
        except LingerError as error:
            log(f"linger: a message that could not be sent stays hidden: {error}")


def log_request(address: str, request: Request, status: int, began: float) -> None:
    """Logs a request on one line: the time of the response, the address, the name of the token in
    its file, the request (but a malformed one), the status, and how long it took."""
    milliseconds = (time.monotonic() - began) * 1000
    # The target has no control characters but those of latin-1.
    target = request.target.encode("ascii", "backslashreplace").decode()
    line = f"{request.grant.token_name} {request.method} {target} {status} {milliseconds:.1f} ms"
    now = time.time()
    utc = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}Z"
    log(f"{utc} {address} {line}")


INTERNAL_ERROR = "internal server error; see the server log"


class ReplySlot:
    """Whether a reply is pending that another thread is to send.

        not pending --expect()--> pending --complete()--> not pending

    The thread that has sent the reply calls `complete`, after all else that it does for this
    connection; the other methods are for the connection's thread.
    """

    __slots__ = ("_lock", "complete", "consumer", "deadline", "expect", "is_awaited", "is_pending")

    def __init__(self) -> None:
        self._lock = lock = _thread.allocate_lock()  # locked while a reply is pending
        self.expect: Callable[[], object] = lock.acquire
        """Makes a reply pending, when none is."""
        self.complete: Callable[[], None] = lock.release
        """Notes that the reply has been sent, or that it never will be."""
        self.is_pending: Callable[[], bool] = lock.locked
        self.consumer: Optional[Consumer] = None  # the waiting consumer, if the reply is for one
        self.deadline = 0.0  # when its wait ends
        # Whether the connection's thread has begun to wait for the reply, and so does nothing
        # else before `complete`; if not, it may be about to.
        self.is_awaited = False

    def wait(self, seconds: float = -1) -> bool:
        """Waits up to `seconds` for the reply to be sent; returns whether it has been."""
        self.is_awaited = True
        if not self._lock.acquire(timeout=seconds):
            return False
        self.is_awaited = False
        self._lock.release()
        return True


class Connection:
    """A client's connection, from the first byte to the last; its thread runs `run`.

    The committer calls what `defer` returned; `wake` and `is_disconnected` are for any thread.
    """

    __slots__ = (
        "_answered", "_answered_at", "_api", "_cache", "_closing", "_drain_on_close",
        "_first_request", "_reader", "_server", "_slot", "_socket", "_started_at", "_stream",
        "address", "idle", "input", "output",
    )  # fmt: skip

    def __init__(self, connection: socket.socket, address: str, server: Server) -> None:
        self._socket = connection
        self.address = address
        self._server = server
        self._api = server.api
        self._stream = PlainStream(connection, server.timeval)
        self._cache = RequestCache(server.header_cache, self)
        self._reader = RequestReader(self._cache, server.api.admit)
        self._slot, self._answered = ReplySlot(), server.requests.begin()
        self.idle = True  # whether it waits for the first byte of a request
        self._closing = False
        self._drain_on_close = False  # whether the client may be sending what is not read
        self._first_request = True  # whether its first request has not been answered
        self.input = Reservation(server.memory)  # what was received of a request, until it is done
        self.output = Reservation(server.memory)  # what is to be sent in response
        self._started_at = self._answered_at = time.monotonic()  # request and response
        server.active.add(self)

    def run(self) -> None:
        """Serves requests until the connection is closed."""
        try:
            if self._server.access.tls is not None:
                self._start_tls(self._server.access.tls)
            if self._socket in self._server.refused:
                error = Unavailable("too many connections: try again soon")
                self._send(NO_REQUEST, error_response(error))
                self._answered[NO_ROUTE, error.status] = 1
                self._drain_on_close = True
            while not self._closing:
                self._serve_request()
            self._await_reply(over=True)  # another thread closes before it has sent its reply
            if self._drain_on_close or self._stream.is_ready(select.POLLIN):
                self._drain()
        except OSError:
            pass  # the connection is lost, or its client is too slow
        except Exception:
            log(traceback.format_exc())

    def finish(self) -> None:
        """Ends what `run` has begun, after it."""
        self._await_reply(over=True)
        self._cache.close()
        self._reader.discard()
        self.input.release()
        self.output.release()
        self._server.release_consumer(self)
        self._server.active.discard(self)
        self._server.requests.end(self._answered)
        with contextlib.suppress(OSError):
            self._stream.end()

    def wake(self) -> None:
        """Makes an idle connection end, since the server stops."""
        if self.idle:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RD)

    def _start_tls(self, context: ssl.SSLContext) -> None:
        """Does the handshake, in this thread and within the time for a head."""
        deadline = time.monotonic() + self._server.read_timeout
        if self._server.stopping:
            raise ConnectionAbortedError
        stream = TlsStream(self._socket, self._server.timeval, context)
        while not stream.handshake():
            stream.feed(self._receive(deadline))
        self._stream = stream

    def _serve_request(self) -> None:
        """Reads a request and responds to it.  OSError: there is nobody to respond to."""
        try:
            request = self._read_request()
            if request is None:
                return
        except LingerError as error:
            failed = self._reader.request or NO_REQUEST
            self._closing = True
            self._reader.discard()
            self.input.release()
            self._send(failed, error_response(error))
            self._note_answered(failed, error.status)
            self._drain_on_close = True
            return
        try:
            endpoint = request.endpoint or self._api.find_endpoint(request)
            response = endpoint(request, *request.names)
        except Exception as error:
            response = self._response_to_error(request, error)
        if request.body:
            request.release_body()
        if response is not None:
            if self._slot.is_pending():  # the operation could not be started
                self._complete_reply()
            self.input.release()
            self._send(request, response)
            self._note_answered(request, response.status)
        elif request.close_after and self._slot.consumer is None:
            self._slot.wait()  # nothing more is to be received

    def _response_to_error(self, request: Request, error: Exception) -> Response:
        """The response to an exception in an endpoint: every one ends here."""
        if isinstance(error, LingerError):
            return error_response(error)
        log("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        request.close_after = True
        return error_response(LingerError(INTERNAL_ERROR))

    # -- reading

    def _read_request(self) -> Optional[Request]:
        """The next request; None when the connection is to be closed."""
        reader = self._reader
        if reader.buffer:  # it was sent before the last reply
            self._await_reply()
        else:
            reader.buffer = self._await_data()
        if self._closing:
            return None
        if self._server.log_requests:
            self._started_at = time.monotonic()
        return reader.next_request() or self._read_rest()

    def _read_rest(self) -> Optional[Request]:
        """Receives the rest of a request of which some bytes have come."""
        reader = self._reader
        request, in_body, deadline = None, None, 0.0
        try:
            while request is None:
                if in_body is not reader.in_body:  # head and body have the same time each
                    in_body = reader.in_body
                    deadline = time.monotonic() + self._server.read_timeout
                if reader.expects_continue:
                    reader.expects_continue = False
                    self._stream.send(CONTINUE)
                data = self._receive(deadline, reader.wanted)
                if not data:
                    self._closing = True
                    reader.end()
                    return None
                self._reserve_input(reader.received + len(data))
                reader.feed(data)
                request = reader.next_request()
        except TimeoutError:
            part = "body" if in_body else "request"
            raise LingerError(f"the {part} took too long to arrive", 408) from None
        return request

    def _reserve_input(self, received: int) -> None:
        """Reserves what was received of a request; a client that may have no token gets less."""
        request = self._reader.request
        known = request is not None and request.grant is not NO_ACCESS
        self.input.resize(received, 1.0 if known else ANONYMOUS_SHARE)

    def _receive(self, deadline: float, size: int = RECEIVE_SIZE) -> bytes:
        """The next bytes; empty at the end of the stream.  TimeoutError at the deadline.

        A server that stops ends the streams of idle connections, also of one whose next request
        has just begun to come.  That is not its client's fault: ConnectionAbortedError.
        """
        while (remaining := deadline - time.monotonic()) > 0:
            self._stream.set_timeout(remaining)
            try:
                data = self._stream.receive(size)
            except ssl.SSLWantReadError:
                continue
            except BlockingIOError:
                break
            if not data and self._server.stopping:
                raise ConnectionAbortedError
            return data
        raise TimeoutError

    def _await_data(self) -> bytes:
        """Receives the first bytes of a request; if there are none, the connection is to be closed.

        A reply may be pending meanwhile.  Here the wait of a consumer ends, in time or because
        its client has disconnected.
        """
        server, stream, slot = self._server, self._stream, self._slot
        timeout: float = server.idle_timeout
        receive = stream.receive
        if self._first_request or stream.is_shared or slot.consumer is not None:
            receive = self._receive_first
            if slot.consumer is not None:
                timeout = min(max(slot.deadline - time.monotonic(), 0.001), timeout)
        data = b""
        self.idle = True
        while timeout > 0 and not server.stopping:
            if timeout != stream.timeout:
                stream.set_timeout(timeout)
            try:
                data = receive(RECEIVE_SIZE)
                break
            except BlockingIOError:
                timeout = self._idle_time_left()
        if not data:
            self._closing = True  # the pending reply, if there is one, is the last
        if slot.is_pending():
            self._await_reply(over=not data)
        self.idle = False
        return data

    def _receive_first(self, size: int) -> bytes:
        """The first bytes of the first request, with TLS, or while a consumer waits."""
        if self._first_request or self._slot.consumer is not None:
            size = FIRST_RECEIVE_SIZE
        if self._first_request:  # until it is received, it can be seen in the socket
            self._stream.peek()
            self._server.first_requests.start(self._socket)
        if not self._stream.is_shared:
            return self._stream.receive(size)
        if self._slot.is_pending():
            if not self._stream.peek():
                return b""
            self._await_reply()
        try:
            return self._stream.receive(size)
        except ssl.SSLWantReadError:
            return self._receive(time.monotonic() + self._server.read_timeout)

    def _idle_time_left(self) -> float:
        """Seconds to go on waiting after a timeout; ends the wait of a consumer in time."""
        if self._slot.consumer is not None:
            left = self._slot.deadline - time.monotonic()
            if left > 0:
                return min(left, self._server.idle_timeout)
            self._await_reply()
        return self._answered_at + self._server.idle_timeout - time.monotonic()

    def _drain(self) -> None:
        """Lets a client that is still sending read its response first (RFC 9112 9.6)."""
        self._stream.end()
        self._socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGERING_CLOSE_TIMEOUT
        left = LINGERING_CLOSE_BYTES
        with contextlib.suppress(TimeoutError):
            while left > 0 and (data := self._receive(deadline)):
                left -= len(data)

    # -- the pending reply

    def defer(
        self,
        request: Request,
        to_response: ToResponse,
        consumer: Optional[Consumer] = None,
        wait: float = 0,
    ) -> DoneCallback:
        """Makes the reply to a request pending; returns the callback that sends it.

        `to_response` turns the finished operation into the response.  With `wait`, the operation
        is the take of a consumer that waits so many seconds; `Unavailable` if too many do.
        """
        if wait:
            self.input.resize(min(self.input.size, MAX_REQUEST_HEAD))  # the body is not kept
            self.start_waiting()
            self._slot.consumer, self._slot.deadline = consumer, time.monotonic() + wait
        self._slot.expect()
        return functools.partial(self._reply, request, to_response)

    def is_disconnected(self) -> bool:
        """Whether the client has closed its end, or the connection is broken."""
        return self._stream.is_disconnected()

    def disconnect(self, only_stuck: bool = False) -> None:
        """Breaks the connection; `only_stuck`: if the client does not take what is sent."""
        if not (only_stuck and self._stream.is_ready(select.POLLOUT)):
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def start_waiting(self) -> None:
        """Counts this connection as a waiting consumer: before the wait of a take, a call or
        /drained, and before a stream.  `Unavailable` if too many wait."""
        self._server.first_requests.end(self._socket)
        self._server.admit_consumer(self)

    def yield_to_simultaneous(self) -> None:
        """Before a first request that only reads: see `FirstRequests`."""
        if self._first_request:
            self._server.first_requests.wait(self._socket)

    def _await_reply(self, over: bool = False) -> None:
        """Waits until no reply is pending.  Cancels a waiting consumer when its wait is `over`,
        its time has passed or its client has disconnected."""
        slot = self._slot
        consumer = slot.consumer
        while consumer is not None and slot.is_pending():
            left = min(slot.deadline - time.monotonic(), DISCONNECT_CHECK_INTERVAL)
            if over or left <= 0 or self.is_disconnected():
                self._server.broker.cancel(consumer)
                consumer = None
            else:
                slot.wait(left)
        slot.wait()

    def _reply(self, request: Request, to_response: ToResponse, operation: Operation) -> None:
        """Sends the pending reply, or has a thread of its own do so if that takes long.

        Runs in the committer's thread, so it does not block.  Whatever fails, the connection's
        thread does not wait forever.
        """
        try:
            if operation.is_large or self.output.size > SMALL_AMOUNT:
                _thread.start_new_thread(self._reply_large, (request, to_response, operation))
                return
            try:
                response = to_response(request, operation)
            except Exception as error:
                response = self._response_to_error(request, error)
            data = self._head(request, response) + response.body  # a HEAD is never deferred
            if response.undo is not None and self._is_abandoned():
                _thread.start_new_thread(self._finish_reply, (request, response))
                return
            rest = self._stream.send_at_once(data)
            if rest:
                _thread.start_new_thread(self._finish_reply, (request, response, rest))
                return
            self._note_answered(request, response.status)
        except Exception:  # no more threads, or a bug
            self._closing = True
            self._complete_reply()
            raise
        self._complete_reply()

    def _is_abandoned(self) -> bool:
        """Whether the consumer of the reply has waited, and its client has gone."""
        consumer = self._slot.consumer
        return consumer is not None and consumer.ticket > 0 and self.is_disconnected()

    def _reply_large(self, request: Request, to_response: ToResponse, operation: Operation) -> None:
        """As `_reply`, for a large response; in a thread of its own."""
        response = error_response(LingerError(INTERNAL_ERROR))  # if another cannot be rendered
        try:
            response = to_response(request, operation)
        except Exception as error:
            response = self._response_to_error(request, error)
        finally:
            operation.results = []  # so that each message is freed once it is sent
            self._finish_reply(request, response)

    def _finish_reply(
        self, request: Request, response: Response, rest: Optional[bytes] = None
    ) -> None:
        """Sends the pending reply, or the `rest` of it; in a thread of its own.

        Undoes what it says if it cannot be sent.  A client that has gone may have closed its
        sending side only: it reads a 204 then.
        """
        try:
            if rest is not None:
                self._stream.send_encoded(rest)
            else:
                if response.undo is not None and self._is_abandoned():
                    self._closing = True
                    undo_unsent(response)
                    response = NO_CONTENT
                self._send_pieces(request, response)
            self._note_answered(request, response.status)
        except BaseException as error:
            self._closing = True
            undo_unsent(response)
            if not isinstance(error, OSError):
                raise
        finally:
            self._complete_reply()

    def _complete_reply(self) -> None:
        """Lets the connection's thread go on after the pending reply."""
        if self._slot.consumer is not None:
            self._server.release_consumer(self)
            self._slot.consumer = None
        if self.input.size or self.output.size:
            self.input.release()
            self.output.release()
        if self._closing and not self._slot.is_awaited:  # then it may be receiving
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RD)
        self._slot.complete()

    # -- sending

    def _send(self, request: Request, response: Response) -> None:
        """Sends a response; undoes what it says if it cannot be sent."""
        try:
            response = response.reserved(request, self.output)
            self._send_pieces(request, response)
        except OSError:
            undo_unsent(response)
            raise
        finally:
            self.output.release()

    def _head(self, request: Request, response: Response) -> bytes:
        """The head of a response; notes if it is the last one of the connection."""
        server = self._server
        if request.close_after or server.stopping:
            self._closing = True
        return response.head(request, CLOSE if self._closing else server.keep_alive)

    def _send_pieces(self, request: Request, response: Response) -> None:
        """Sends a whole response; gives the memory of a long one back as it is sent."""
        data = self._head(request, response)
        if len(response.body) <= SMALL_AMOUNT and has_body(request):
            data += response.body
        self._stream.send(data)
        pieces, length, sent = response.pieces(request), response.length(), 0
        reserved, is_array = self.output.size, response.array is not None
        with response.file or contextlib.nullcontext():
            while True:
                with self._server.memory.large_work if is_array else contextlib.nullcontext():
                    piece = next(pieces, None)
                if piece is None:
                    return
                if response.stream is not None:
                    self.output.force(len(piece))
                self._stream.send(piece)
                sent += len(piece)
                if is_array:
                    self.output.force(reserved * (length - sent) // length)

    def _note_answered(self, request: Request, status: int) -> None:
        self._answered_at = time.monotonic()
        self._answered[request.counted_as, status] += 1
        if self._first_request:
            self._first_request = False
            self._server.first_requests.end(self._socket)
        if self._server.log_requests:
            log_request(self.address, request, status, self._started_at)


class Handler(BaseHTTPRequestHandler):
    """What `ThreadingHTTPServer` runs in the thread of a connection: a `Connection`."""

    server: Server

    def setup(self) -> None:
        self._connection = Connection(self.request, self.client_address[0], self.server)

    def handle(self) -> None:
        self._connection.run()

    def finish(self) -> None:
        self._connection.finish()


# ---------------------------------------------------------------------------------------------
# Server: accepts connections, starts their threads, enforces the limits that concern them all,
# and stops gracefully.
# ---------------------------------------------------------------------------------------------


class AddressLimiter:
    """Counts the connections of each client, up to a limit; 0 is no limit, and counts nothing."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # guards both dicts
        self._keys: dict[socket.socket, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()

    def __len__(self) -> int:
        with self._lock:
            return len(self._counts)

    def acquire(self, connection: socket.socket, address: str) -> int:
        """Counts a connection; returns by how many its client exceeds the limit then."""
        if not self._limit:
            return 0
        key = client_key(address)
        with self._lock:
            self._keys[connection] = key
            self._counts[key] += 1
            return max(self._counts[key] - self._limit, 0)

    def release(self, connection: socket.socket) -> None:
        """Stops counting a connection, if it is counted."""
        if not self._limit:
            return
        with self._lock:
            key = self._keys.pop(connection, None)
            if key is not None:
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]


class FirstRequests:
    """Keeps the order of first requests that were sent together on two connections.

    A client may post on one connection and read on another without waiting for a response, as
    `lingerclient` and its tests do: Linger 1.0.1, with its one thread, took them in order.  So a
    first request that only reads waits for one that has come on another new connection.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # its lock guards what follows
        self._since: dict[socket.socket, float] = {}  # new connections by when they were accepted
        self._started: set[socket.socket] = set()  # those whose request is being received

    def add(self, connection: socket.socket) -> None:
        """Adds a connection that has just been accepted."""
        with self._changed:
            self._since[connection] = time.monotonic()

    def start(self, connection: socket.socket) -> None:
        """Notes that its first request is about to be received."""
        with self._changed:
            if connection in self._since:
                self._started.add(connection)

    def end(self, connection: socket.socket) -> bool:
        """Notes that nobody needs to wait for it any more; returns whether that is new."""
        with self._changed:
            self._started.discard(connection)
            if self._since.pop(connection, None) is None:
                return False
            self._changed.notify_all()
            return True

    def wait(self, connection: socket.socket) -> None:
        """Waits for a first request that came together with that of this connection, but for no
        more than MAX_SIMULTANEOUS: among more, all would wait for each other."""
        if not self.end(connection):
            return
        with self._changed:
            limit = time.monotonic() - SIMULTANEOUS_WINDOW
            new = [other for other, since in self._since.items() if since > limit]
            others = self._with_request(new) if new else set()
            if 0 < len(others) <= MAX_SIMULTANEOUS:
                self._changed.wait_for(
                    lambda: self._since.keys().isdisjoint(others), SIMULTANEOUS_WINDOW
                )

    def _with_request(self, connections: Iterable[socket.socket]) -> set[socket.socket]:
        """Those that have sent something: one that is silent holds nobody up."""
        found = self._started.intersection(connections)
        poller = select.poll()
        by_descriptor = {other.fileno(): other for other in connections}
        for descriptor in by_descriptor:
            poller.register(descriptor, select.POLLIN)
        found.update(by_descriptor[descriptor] for descriptor, _ in poller.poll(0))
        return found


class ConnectionThreads:
    """Threads that serve a connection each, and then wait for another one.

    Some clients make a connection for each request.  To start a thread for each took a tenth to a
    fifth of the server's CPU.
    """

    def __init__(self, serve: Callable[..., None]) -> None:
        """`serve(*connection)` serves a connection until it is closed; it must not raise."""
        self._serve = serve
        self._idle: collections.deque[queue.SimpleQueue[Any]] = collections.deque()
        self._is_closed = False

    def start(self, *connection: Any) -> None:
        """Has a connection served; RuntimeError if the system has no thread for it."""
        try:
            inbox = self._idle.pop()
        except IndexError:
            _thread.start_new_thread(self._run, connection)
        else:
            inbox.put(connection)

    def close(self) -> None:
        """Ends the threads that wait, and each other one when it has served its connection."""
        self._is_closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().put(None)

    def _run(self, *connection: Any) -> None:
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        while connection:
            self._serve(*connection)
            connection = ()  # it need not be kept
            if len(self._idle) < MAX_IDLE_THREADS:
                self._idle.append(inbox)
                if self._is_closed:
                    self.close()
                connection = inbox.get()


class ThreadlessConnections:
    """Connections for which the system has no thread: the accepting thread responds 503.

    A close while the client still sends could destroy the response, so what it sends is read and
    discarded first, until it closes or its time is over (RFC 9112 9.6).  Belongs to one thread.
    """

    def __init__(self, close: Callable[[socket.socket], None]) -> None:
        """`close(connection)` closes a connection."""
        self._close = close
        self._connections: dict[int, tuple[socket.socket, float]] = {}  # with their deadlines
        self._poller = select.poll()

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: socket.socket, response: bytes) -> None:
        """Sends a response, and waits for the client to close the connection."""
        try:
            connection.setblocking(False)
            connection.send(response)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
            return
        deadline = time.monotonic() + LINGERING_CLOSE_TIMEOUT
        self._connections[connection.fileno()] = connection, deadline
        self._poller.register(connection, select.POLLIN)

    def discard_input(self) -> None:
        """Reads what clients have sent; closes the connections that are over."""
        now = time.monotonic()
        ready = {descriptor for descriptor, _ in self._poller.poll(0)}
        for descriptor, (connection, deadline) in list(self._connections.items()):
            data = b"x"
            with contextlib.suppress(OSError):
                data = connection.recv(RECEIVE_SIZE) if descriptor in ready else data
            if not data or deadline < now:
                self.remove(descriptor)

    def remove(self, descriptor: int) -> None:
        """Closes a connection."""
        self._poller.unregister(descriptor)
        self._close(self._connections.pop(descriptor)[0])

    def close(self) -> None:
        """Closes all connections."""
        for descriptor in list(self._connections):
            self.remove(descriptor)


def set_keepalive(listener: socket.socket) -> None:
    """Lets the kernel probe silent peers: one that vanished without a word would keep its
    connection, and a waiting consumer, until it is written to.  Accepted connections inherit it."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    times = (("KEEPIDLE", PROBE_AFTER), ("KEEPINTVL", PROBE_INTERVAL), ("KEEPCNT", PROBES))
    for name, value in times:
        if hasattr(socket, f"TCP_{name}"):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)


def listening_address(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """The family and address of a socket that listens there."""
    if host.startswith(UNIX):
        return socket.AF_UNIX, os.path.abspath(host[len(UNIX) :])
    return socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port)


def remove_stale_socket(path: str) -> None:
    """Deletes the socket that a dead server has left; OSError for one that a server listens on,
    and for what is no socket."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "there is a file that is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(SOCKET_PROBE_TIMEOUT)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
        raise OSError(errno.EADDRINUSE, "a server listens there")


def user_of_peer(connection: socket.socket) -> str:
    """The user at the other end of a Unix socket as `unix:<uid>`, where the system tells it."""
    try:
        size = struct.calcsize("3i")
        _, uid, _ = struct.unpack(
            "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        )
    except (AttributeError, OSError):  # not on macOS
        return UNIX
    return f"{UNIX}{uid}"


class Server(ThreadingHTTPServer):
    """Listens, gives each connection a thread, and stops gracefully.

    `with server:` serves nothing yet; `serve_forever` does, and `serve()` does so in a thread.
    `max_connections_per_address=0` is no limit, `max_waiting=0` three of four connections;
    `max_connections=0` and `max_memory=0` are what fits the machine's memory.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = BACKLOG
    stopping = closed = False
    _socket_inode = 0  # of its Unix socket

    def __init__(
        self,
        broker: Union[Broker, Callable[[], Broker]],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        read_timeout: float = READ_TIMEOUT,
        idle_timeout: float = IDLE_TIMEOUT,
        max_connections: int = 0,
        max_connections_per_address: int = 0,
        max_waiting: int = 0,
        max_memory: int = 0,
        log_requests: bool = False,
        access: Optional[Access] = None,
    ) -> None:
        """Binds the address (port 0: a free one), or with `unix:<path>` a Unix socket.  Without
        `access`, everybody on this machine has access.  OSError if it cannot be bound,
        `BadRequest` if `access` forbids it.  `broker` may be a function: then it is called after
        that, so that a refused start changes no file."""
        self.access = access or Access()
        self.read_timeout, self.idle_timeout = read_timeout, idle_timeout
        self.keep_alive = f"Connection: keep-alive\r\nKeep-Alive: timeout={int(idle_timeout)}\r\n"
        self.max_connections = max_connections or default_max_connections()
        self.max_waiting = max_waiting or int(self.max_connections * WAITING_SHARE) or 1
        self.memory = MemoryBudget(max_memory or default_max_memory())
        self.log_requests = log_requests
        self.header_cache, self.first_requests = HeaderCache(), FirstRequests()
        self.requests, self.clients = RequestCounts(), AddressLimiter(max_connections_per_address)
        self._threadless = ThreadlessConnections(self.shutdown_request)
        self.connections: set[socket.socket] = set()  # all that are open
        self.refused: set[socket.socket] = set()  # those of them that exceed a limit
        self.active: set[Connection] = set()  # those whose threads run
        self._waiting: set[Connection] = set()  # those whose consumers wait
        self._count_lock = threading.Lock()  # guards `_waiting` and `closed`
        self._stopped = threading.Event()
        self._accepting = threading.Lock()  # held by serve_forever
        self._emptied = threading.Condition()  # a connection was closed while the server stops
        self.address_family, address = listening_address(host, port)
        super().__init__(address, Handler)
        self._open(broker)

    def _open(self, broker: Union[Broker, Callable[[], Broker]]) -> None:
        try:
            self.broker = broker if isinstance(broker, Broker) else broker()
        except BaseException:
            self._close_listener()
            raise
        self.api = Api(self)
        self._connection_threads = ConnectionThreads(self.process_request_thread)
        with contextlib.suppress(NotFound):
            own_source()  # before anybody changes the file
        disown_in_children(self)

    def disown(self) -> None:
        """In a forked child: closes the sockets, so that they end with the parent."""
        self.stopping = self.closed = True
        self._count_lock, self._accepting = threading.Lock(), threading.Lock()
        for connection in (self.socket, *self.connections):
            connection.close()

    def server_bind(self) -> None:
        """Binds the address, unless `access` forbids it.  Does not ask the name service for the
        host's name, as HTTPServer does."""
        if self.address_family == socket.AF_UNIX:
            self._bind_unix(str(self.server_address))
            return
        socketserver.TCPServer.server_bind(self)
        set_keepalive(self.socket)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)
        self.access.listen(self.server_name)

    def _bind_unix(self, path: str) -> None:
        """Nobody can connect before it listens, so the mode is there in time."""
        if self.access.tls is not None:
            raise BadRequest("a Unix socket is used without TLS: leave out cert")
        remove_stale_socket(path)
        socketserver.TCPServer.server_bind(self)
        os.chmod(path, SOCKET_MODE)
        self._socket_inode = os.lstat(path).st_ino
        self.server_name, self.server_port = UNIX + path, 0
        self.access.listen(self.server_name)

    def server_close(self) -> None:
        """Stops listening; deletes its Unix socket, unless another server has replaced it."""
        super().server_close()
        inode, self._socket_inode = self._socket_inode, 0
        with contextlib.suppress(OSError):
            if inode and os.lstat(str(self.server_address)).st_ino == inode:
                os.unlink(str(self.server_address))

    def server_activate(self) -> None:
        """Listens, and makes what accepting needs."""
        super().server_activate()
        self.timeval = timeval_format(self.socket)
        # A byte written to `wake_fd` ends the sleep of accepting.
        self._wake_reader, self.wake_fd = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self.wake_fd, False)

    @property
    def url(self) -> str:
        """Where this machine reaches it, as `http://127.0.0.1:8989`."""
        if self.server_name.startswith(UNIX):
            return f"{HTTP_UNIX}://{urllib.parse.quote(self.server_name[len(UNIX) :], safe='')}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.server_name, self.server_name)
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self.access.tls else 'http'}://{host}:{self.server_port}"

    # -- accepting

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Accepts connections until `shutdown`; sleeps while there are none."""
        with self._accepting:
            if self.stopping:
                return
            self.socket.setblocking(False)
            poller = select.poll()
            poller.register(self.socket, select.POLLIN)
            poller.register(self._wake_reader, select.POLLIN)
            while not self.stopping:
                poller.poll(THREADLESS_INTERVAL if self._threadless else None)
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_reader, 64)
                while not self.stopping and self._accept():
                    pass
                self._threadless.discard_input()
            self._threadless.close()

    def _accept(self) -> bool:
        """Accepts a connection; returns whether there may be more."""
        try:
            connection, address = self.socket.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._stopped.wait(0.05)  # until one is closed; poll would return at once
            return False
        connection.setblocking(True)
        if self.address_family == socket.AF_UNIX:
            address = (user_of_peer(connection), 0)
        excess = max(
            len(self.connections) + 1 - self.max_connections,
            self.clients.acquire(connection, address[0]),
        )
        if excess > MAX_REFUSED_CONNECTIONS:
            self.shutdown_request(connection)
            return True
        if excess > 0:
            self.refused.add(connection)
        self.connections.add(connection)
        self.first_requests.add(connection)
        try:
            self._connection_threads.start(connection, address)
        except RuntimeError:  # the system has no more threads
            self._refuse(connection)
        return True

    def _refuse(self, connection: socket.socket) -> None:
        """Responds 503 in this thread, which cannot wait for a client or a TLS handshake."""
        if self.access.tls or len(self._threadless) >= MAX_REFUSED_CONNECTIONS:
            self.shutdown_request(connection)
            return
        error = Unavailable("the system has no thread for this connection: try again soon")
        response = error_response(error)
        self._threadless.add(connection, response.head(NO_REQUEST, CLOSE) + response.body)

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection."""
        self.clients.release(request)
        self.first_requests.end(request)
        super().shutdown_request(request)
        self.connections.discard(request)
        self.refused.discard(request)
        if self.stopping:
            with self._emptied:
                self._emptied.notify()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs a bug; a connection that broke while it was set up is none."""
        if not isinstance(sys.exc_info()[1], OSError):
            log(traceback.format_exc())

    # -- what all connections share

    def admit_consumer(self, connection: Connection) -> None:
        """Counts a consumer that waits; `Unavailable` when too many do, so that clients that post
        can still connect."""
        with self._count_lock:
            if len(self._waiting) >= self.max_waiting:
                raise Unavailable(f"{self.max_waiting} consumers are waiting: try again soon")
            self._waiting.add(connection)

    def release_consumer(self, connection: Connection) -> None:
        """Stops counting a consumer."""
        with self._count_lock:
            self._waiting.discard(connection)

    def reload(self) -> None:
        """Reads the files of `access`; if one is invalid, logs that and keeps what was read."""
        try:
            self.access.reload()
        except LingerError as error:
            log(f"linger: {error}; what was read before still holds")
        else:
            log("linger: the files of tokens and certificate were read again")

    # -- stopping

    def await_stop(self, seconds: float) -> None:
        """Sleeps, but no longer than until the server stops."""
        self._stopped.wait(seconds)

    def shutdown(self) -> None:
        """Makes `serve_forever` return; safe in a signal handler."""
        self.stopping = True
        with contextlib.suppress(BlockingIOError):  # the pipe is full, so it will wake up anyway
            os.write(self.wake_fd, b"!")

    def close(self) -> None:
        """Stops: waiting GETs get 204, requests under way finish, the database is closed."""
        with self._count_lock:
            if self.closed:
                return
            self.closed = True
        self.shutdown()
        self._stopped.set()
        with self._accepting:
            self._close_listener()
        self.broker.cancel_all()
        for connection in self.active.copy():
            connection.wake()
        self._connection_threads.close()
        with self._emptied:
            self._emptied.wait_for(lambda: not self.connections, STOP_TIMEOUT)
        self.broker.close()

    def _close_listener(self) -> None:
        self.server_close()
        os.close(self._wake_reader)
        os.close(self.wake_fd)

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------
# Encoding: bodies, names and parameters as the client sends them, messages as it receives them,
# and the records of a dump.  Knows JSON and header values, but no connection.
# ---------------------------------------------------------------------------------------------

ChannelNames = Union[str, Sequence[str]]
MessageOrId = Union[Message, int]
Delivery = tuple[int, Optional[int]]  # id of a message, and its lease or None for any lease
Item = Union[object, tuple[object, Optional[str], Mapping[str, object]]]  # of a batch

TEXT_TYPE = f"{DEFAULT_TYPE}; charset=utf-8"
TO_STRICT_JSON = json.JSONEncoder(  # without NaN and Infinity (RFC 8259 6)
    ensure_ascii=False, separators=(",", ":"), allow_nan=False
).encode
INTEGER_FIELDS = {name for name, kind in get_type_hints(Message).items() if kind is int}
# What an event leaves out of its message.
NO_MESSAGE_FIELDS = dict.fromkeys(INTEGER_FIELDS & set(MESSAGE_KEYS), 0) | {"channel": ""}


def encode_text(text: str) -> bytes:
    """Returns a text in UTF-8; `BadRequest` if it is none, or contains surrogates."""
    if not isinstance(text, str):
        raise BadRequest(f"{text!r} must be text")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest("the text must be Unicode, without surrogates") from None


def encode_message(body: object, type: Optional[str]) -> tuple[bytes, str]:
    """Returns the bytes and type of a body: a str is sent as UTF-8, and what is no bytes as JSON.

    The type of bytes is text/plain, as the server's: their character set is not known.
    """
    if type is not None and not (isinstance(type, str) and HEADER_VALUE.fullmatch(type)):
        raise BadRequest("type must be a valid header value")
    if isinstance(body, (bytes, bytearray, memoryview)):
        return bytes(body), type or DEFAULT_TYPE
    if isinstance(body, str):
        return encode_text(body), type or TEXT_TYPE
    try:
        text = TO_STRICT_JSON(body)
    except (TypeError, ValueError, RecursionError) as error:  # of a set, a NaN, a deep list
        raise BadRequest(f"the body must be bytes, text or JSON: {error}") from None
    return encode_text(text), type or JSON_TYPE


def encode_item(table: Sequence[Parameter], item: Item) -> dict[str, object]:
    """Returns an item of a batch as a JSON object."""
    body, type, parameters = item if isinstance(item, tuple) else (item, None, {})
    data, type = encode_message(body, type)
    return {**encode_parameters(table, parameters), **body_object(data), "type": type}


def encode_batch(items: Iterable[Item], table: Sequence[Parameter]) -> tuple[bytes, str]:
    """Returns the body and type of a batch request; the error of a bad item has its index."""
    objects = _each(list(items), functools.partial(encode_item, table))
    return encode_text(TO_JSON(objects)), JSON_TYPE


def encode_parameters(
    table: Sequence[Parameter], values: Mapping[str, object]
) -> dict[str, object]:
    """Returns the values that are not None under their HTTP names; `BadRequest` if one is bad."""
    check_parameters(values, table)
    named = {name.replace("_", "-"): value for name, value in values.items() if value is not None}
    parse_parameters(named, table)
    return named


def pop_own_headers(query: dict[str, object]) -> str:
    """Removes a message's own headers from the parameters of a query; returns their lines."""
    return parse_own_headers("headers", query.pop("headers", {}))


def encode_path(*segments: str) -> str:
    """Returns the path with these segments; a comma in a name is encoded as well."""
    return "".join("/" + urllib.parse.quote(encode_text(s), safe="") for s in segments)


def delivery_of(message: MessageOrId, lease: Optional[int] = None) -> Delivery:
    """Returns the id and lease of a message, or an id and the lease passed with it."""
    if isinstance(message, Message):
        return message.id, message.lease if lease is None else lease
    return message, lease


def list_names(channels: ChannelNames) -> Sequence[str]:
    """Returns one name or several as a sequence."""
    return [channels] if isinstance(channels, (str, bytes)) else channels


def parse_message(item: Mapping[str, Any]) -> Message:
    """Returns the message in a JSON object."""
    fields = {name.replace("-", "_"): value for name, value in item.items()}
    body = fields["body"]
    fields["body"] = base64.b64decode(body) if "encoding" in fields else body.encode("utf-8")
    fields["header_lines"] = parse_own_headers("headers", fields.get("headers", {}))
    if "reply_to" in fields:
        fields["header_lines"] += REPLY_LINE
    return Message(**{name: fields[name] for name in Message._fields if name in fields})


def parse_event(item: Mapping[str, Any]) -> Message:
    """Returns the message in the JSON object of an event, which leaves some fields out."""
    return parse_message({**NO_MESSAGE_FIELDS, **item})


def parse_listing(items: Iterable[Mapping[str, Any]]) -> list[tuple[Message, str]]:
    """Returns the messages of a listing with their states."""
    return [(parse_message(item), item["state"]) for item in items]


def parse_headers(headers: http.client.HTTPMessage, body: bytes) -> tuple[Message, str]:
    """Returns the message, and its state, in a response with `x-linger-*` headers.

    A reason that was too long for a header ends in an ellipsis.
    """
    fields: dict[str, Any] = {"type": headers["content-type"], "body": body}
    for name in Message._fields:
        value = headers.get(delivery_header(name))
        if value is not None:
            convert = int if name in INTEGER_FIELDS else urllib.parse.unquote
            fields[name] = convert(value)
    if "x-linger-error-cut" in headers:
        fields["error"] += "…"
    names = [name.lower() for name in headers if name.lower().startswith(OWN_HEADER)]
    own = {name[len(OWN_HEADER) :]: headers[name].encode("latin-1").decode() for name in names}
    fields["header_lines"] = parse_own_headers("headers", own)
    if "x-linger-reply-to" in headers:
        fields["header_lines"] += REPLY_LINE
    return Message(**fields), headers["x-linger-state"]


def dumped_record(item: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a dump keeps of a listed message: parameters only where not the default."""
    record = dict(item)
    if record["linger"]:
        record["linger"] = max(record["linger"] - record["received"], 1)
        record["delay"] = min(record.get("delay", 0), record["linger"] - 1)
    values = {p.name: record.get(p.name, p.default) for p in ALL_PARAMETERS}
    changed = {name: value for name, value in values.items() if value != DEFAULTS[name]}
    names = ("channel", "type", "body", "encoding")
    return {**{name: record[name] for name in names if name in record}, **changed}


def in_batches(records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, list[bytes]]]:
    """Groups consecutive dumped records of a channel into batches of JSON items."""
    channel, items, size = "", list[bytes](), 0
    for record in records:
        if not isinstance(record, Mapping) or not isinstance(record.get("channel"), str):
            error = BadRequest("a record must be an object with a text `channel`")
            error.index = len(items)
            raise error
        item = encode_text(TO_JSON(record))
        full = len(items) == MAX_BATCH or size + len(item) > MAX_BATCH_BYTES
        if items and (full or channel != record["channel"]):
            yield channel, items
            items, size = [], 0
        channel = record["channel"]
        items.append(item)
        size += len(item) + 2  # the comma, and the brackets
    if items:
        yield channel, items


# ---------------------------------------------------------------------------------------------
# Transport: sends the client's requests, over a connection per thread.  Knows HTTP and when a
# request may be repeated, but no message.
#
# When a connection breaks, or the status is 504, an idempotent request is sent again.  A request
# that adds or takes a message is not, unless a dedup key makes it safe: the first one may have been
# executed.  A connection that cannot be opened is an error at once.
# ---------------------------------------------------------------------------------------------

DEFAULT_URL = "http://127.0.0.1:8989"
REPORTED_AS = {401: 403, 504: 503}  # 504: as when the connection breaks
RETRYABLE = (502, 503, 504)  # statuses that may pass: the server or its proxy restarts


class Transport:
    """Requests to one server.  Thread-safe.

    Each thread has a connection of its own, which closes when the thread ends.  A forked process
    opens its own connections.
    """

    def __init__(self, url: str, token: str, timeout: float, cafile: Optional[str]) -> None:
        """`timeout`: seconds that connecting may take; the other arguments are as of `Client`."""
        if not (isinstance(token, str) and VISIBLE.fullmatch(token)):
            raise BadRequest("a token must be visible ASCII without spaces")
        if not (isinstance(timeout, (int, float)) and 0 < timeout <= MAX_TIMER):
            raise BadRequest(f"timeout must be a number of seconds above 0, up to {MAX_TIMER}")
        scheme, authority, host, port, self._prefix = _split_url(url)
        self.url = url
        self._base_headers = f"Host: {authority}\r\n"
        if token:
            self._base_headers += f"Authorization: Bearer {token}\r\n"
        kind: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        options: dict[str, Any] = {"timeout": timeout}
        if scheme == "https":
            kind, options["context"] = http.client.HTTPSConnection, _tls_context(cafile)
        elif scheme == HTTP_UNIX:
            kind = _UnixConnection
        address = (host,) if scheme == HTTP_UNIX else (host, port)
        self._connect = functools.partial(kind, *address, **options)
        self.warn: Callable[[str], None] = lambda text: client_logger().warning("%s", text)
        self._lock = threading.RLock()  # guards `closed` and `_connections`
        self.closed = False
        self._connections: weakref.WeakSet[_HTTPConnection] = weakref.WeakSet()
        self._thread = threading.local()  # .connection: of the calling thread

    def close(self) -> None:
        """Shuts all connections down; later requests, and those that wait, fail."""
        for connection in self._end():
            connection.shutdown()
        self._thread.__dict__.clear()

    @locked
    def _end(self) -> list[_HTTPConnection]:
        self.closed = True
        return list(self._connections)

    @locked
    def _register(self, connection: _HTTPConnection) -> None:
        """Lets `close` shut a connection down."""
        if self.closed:
            raise Unavailable("the client is closed")
        self._connections.add(connection)

    def encode(
        self,
        method: str,
        path: str,
        query: Optional[Mapping[str, object]] = None,
        body: bytes = b"",
        type: str = "",
        headers: str = "",
    ) -> bytes:
        """Returns a whole request; parameters of the query that are None are left out.

        `headers`: further header lines.
        """
        given = {name: value for name, value in (query or {}).items() if value is not None}
        if given:
            path += "?" + urllib.parse.urlencode(given)
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._base_headers}"
        head += headers.encode().decode("latin-1")
        if body:
            head += f"Content-Type: {type}\r\n"
        if body or method == "POST":
            head += f"Content-Length: {len(body)}\r\n"
        return head.encode("latin-1") + b"\r\n" + body

    def send(
        self,
        request: bytes,
        timeout: float,
        repeatable: bool = True,
        done: Collection[type[LingerError]] = (),
        into: Optional[BinaryIO] = None,
        stop: Optional[threading.Event] = None,
    ) -> tuple[http.client.HTTPMessage, bytes]:
        """Sends a request; returns the headers and body of the response, or raises its error.

        `timeout`: seconds that the server may be silent.  After a broken connection or a 504, a
        `repeatable` request is sent once more; then an error that is in `done` means that the
        first one was executed.  `into` receives a good body.  `stop` ends the server's wait.
        """
        for repeated in (False, True):
            is_last, connection = repeated or not repeatable, self.connection()
            try:
                status, fields, content = connection.exchange(request, timeout, into, stop)
            except socket.timeout as error:
                raise Unavailable(f"{self.url} did not respond in time") from error
            except (OSError, http.client.HTTPException) as error:
                if is_last or self.closed:
                    raise Unavailable(
                        f"the connection to {self.url} was lost before the response: it is not"
                        f" known whether the request was executed: {reason_of(error)}"
                    ) from error
            else:
                if status != OutcomeUnknown.status or is_last:
                    break
        failed = functools.partial(error_in_response, self.url, status, content)
        if status < 300 or (repeated and type(failed()) in done):
            return fields, content
        raise failed()  # not a variable: it and the traceback would form a cycle

    def stream(
        self,
        path: str,
        timeout: float,
        stop: Optional[threading.Event] = None,
        query: Mapping[str, object] = types.MappingProxyType({}),
    ) -> Iterator[bytes]:
        """Yields the lines of a response that has no end, over a connection of its own, until the
        server ends it; raises as `send` does.  `stop` ends it too."""
        request = self.encode("GET", path, query, headers=f"Accept: {NDJSON}\r\n")
        connection = self.new_connection()
        self._register(connection)
        try:
            yield from connection.lines(request, timeout, stop)
        except (OSError, http.client.HTTPException) as error:
            reason = reason_of(error)
            raise Unavailable(f"the connection to {self.url} was lost: {reason}") from error
        finally:
            connection.close()

    def retry(self, request: Callable[[], T], timeout: float = NEVER) -> T:
        """Runs a request until it succeeds, for up to `timeout` seconds: across a restart.

        Warns before the first pause, so that a user knows why nothing happens.
        """
        deadline = time.monotonic() + timeout
        limit = f" for {timeout:g} s" if timeout < NEVER else ""
        delays = _retry_delays()
        warned = False
        while True:
            try:
                return request()
            except LingerError as error:
                delay = next(delays)
                late = time.monotonic() + delay > deadline
                if error.status not in RETRYABLE or self.closed or late:
                    raise
                if not warned:
                    self.warn(f"{error}; trying again{limit}")
                warned = True
            time.sleep(delay)

    def connection(self) -> _HTTPConnection:
        """Returns the connection of this thread; not its parent's in a forked process."""
        connection: Optional[_HTTPConnection] = getattr(self._thread, "connection", None)
        if connection is None or connection.process != os.getpid():
            connection = self._thread.connection = self.new_connection()
        self._register(connection)
        return connection

    def new_connection(self) -> _HTTPConnection:
        """Returns a connection that no other request uses, not open yet."""
        return _HTTPConnection(self.url, self._connect)


class _UnixConnection(http.client.HTTPConnection):
    """A connection to the Unix socket of a server."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _HTTPConnection:
    """A connection of one thread: opened when needed, kept until it fails or the thread ends.

    Other threads may call only `shutdown`.
    """

    def __init__(self, url: str, connect: Callable[[], http.client.HTTPConnection]) -> None:
        self.process = os.getpid()
        self.url = url
        self._connect = connect
        self._connection: Optional[http.client.HTTPConnection] = None
        self._used = 0.0  # monotonic time of the last response

    def exchange(
        self,
        request: bytes,
        timeout: float,
        into: Optional[BinaryIO],
        stop: Optional[threading.Event] = None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Sends a request and returns the response; OSError or HTTPException if that breaks."""
        sock = self.open()
        try:
            with contextlib.closing(self._send(sock, request, timeout, stop)) as response:
                response.begin()
                body = _read_response(response, into)
        except BaseException:  # also Ctrl-C: the rest would be taken for the next response
            self.close()
            raise
        self._used = time.monotonic()
        if response.will_close or (stop is not None and stop.is_set()):
            self.close()
        return response.status, response.headers, body

    def lines(
        self, request: bytes, timeout: float, stop: Optional[threading.Event]
    ) -> Iterator[bytes]:
        """Sends a request, and yields the lines of the response as they come."""
        with contextlib.closing(self._send(self.open(), request, timeout, stop)) as response:
            response.begin()
            if response.status != 200:
                content = _read_response(response, None)
                raise error_in_response(self.url, response.status, content)
            while line := response.readline():
                yield line

    def _send(
        self, sock: socket.socket, request: bytes, timeout: float, stop: Optional[threading.Event]
    ) -> http.client.HTTPResponse:
        """Sends a request; returns the response, of which nothing has been read yet."""
        sock.settimeout(timeout)
        sock.sendall(request)
        source: Any = sock if stop is None else _StoppableReader(sock, timeout, stop)
        return http.client.HTTPResponse(source)

    def open(self) -> socket.socket:
        """Returns the socket, of a new connection if the server has closed the last one."""
        if self._connection is not None:
            recent = time.monotonic() - self._used < KEEPALIVE_TIMEOUT
            if recent and _is_idle(self._connection.sock):
                return self._connection.sock
            self.close()
        connection = self._connect()
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            reason = reason_of(error)
            if isinstance(error, ssl.SSLCertVerificationError):
                reason += "; `cafile` can name a certificate to trust"
            elif isinstance(error, ssl.SSLError):
                reason += "; perhaps it has no TLS, and its URL begins with http:"
            raise Unavailable(f"cannot connect to {self.url}: {reason}") from error
        self._connection = connection
        return connection.sock

    def shutdown(self) -> None:
        """Ends a request under way in the thread of this connection."""
        connection = self._connection
        if connection is not None and self.process == os.getpid():
            with contextlib.suppress(AttributeError):  # closed just now
                _shut_down(connection.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection if it is open."""
        connection, self._connection = self._connection, None
        if connection is not None:
            sock = connection.sock
            connection.close()
            descriptor = sock.detach()
            if descriptor >= 0:  # an interrupted response still has a file of it
                socket.close(descriptor)

    __del__ = close


class _StoppableReader(io.RawIOBase):
    """Reads a response, for which `stop` ends the wait.

    When `stop` is set, this end of the connection is closed: the server sees that its client
    leaves and delivers no message any more.  One that it has sent before is still received.
    """

    def __init__(self, sock: socket.socket, timeout: float, stop: threading.Event) -> None:
        self._socket = sock
        self._timeout = timeout
        self._stop = stop
        self._stopped = False
        sock.settimeout(STOP_CHECK_INTERVAL)

    def makefile(self, _: str) -> io.BufferedReader:
        """As of a socket, for HTTPResponse."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        deadline = time.monotonic() + self._timeout
        while True:
            if self._stop.is_set() and not self._stopped:
                self._stopped = True
                _shut_down(self._socket, socket.SHUT_WR)
            try:
                return self._socket.recv_into(buffer)
            except socket.timeout:
                if time.monotonic() > deadline:
                    raise


def _shut_down(sock: socket.socket, how: int) -> None:
    """Shuts a TCP connection down, under any TLS; it may be closed just now."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, how)


def _is_idle(sock: socket.socket) -> bool:
    """Returns whether a socket between two requests is open: there must be nothing to receive."""
    sock.settimeout(0)
    try:
        socket.socket.recv(sock, 1, socket.MSG_PEEK)  # of the TCP connection under any TLS
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def error_in_response(url: str, status: int, body: bytes) -> LingerError:
    """Returns the error that a response reports.

    `NotFound` and `Conflict` say something about a message, and only Linger can know it.
    """
    value = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(body)
    kind = ERRORS_BY_STATUS.get(REPORTED_AS.get(status, status), LingerError)
    if not isinstance(value, dict) or not isinstance(value.get("error"), str):
        value = {"error": f"{url} responds with status {status}, and not as Linger does"}
        kind = LingerError if kind in (NotFound, Conflict) else kind
    error = kind(value["error"], status)
    if isinstance(value.get("index"), int):
        error.index = value["index"]
    return error


def _read_response(response: http.client.HTTPResponse, into: Optional[BinaryIO]) -> bytes:
    """Returns the whole body of a response; writes that of a good one `into` a file if given."""
    body, size = io.BytesIO(), 0
    file = into if response.status == 200 else None
    while piece := response.read(FILE_CHUNK):
        size += len(piece)
        if file is None and size > MAX_RESPONSE:
            raise LingerError(f"the response has more than {MAX_RESPONSE} bytes", 502)
        (file or body).write(piece)
    if response.length or (response.length is None and not size):  # or it ends in its head
        raise http.client.IncompleteRead(b"", response.length)
    return body.getvalue()


@functools.cache
def client_logger() -> logging.Logger:
    """Returns the logger of the client, which prints nothing unless the program sets up logging.

    `logging` is imported here because neither a server nor most commands need it.
    """
    import logging

    logger = logging.getLogger("linger")
    logger.addHandler(logging.NullHandler())
    return logger


def _retry_delays() -> Iterator[float]:
    """Yields the seconds to wait before each retry: longer and longer."""
    delay = MIN_RETRY_DELAY
    while True:
        yield delay
        delay = min(2 * delay, MAX_RETRY_DELAY)


def _split_url(url: str) -> tuple[str, str, str, Optional[int], str]:
    """Returns the scheme, the Host header, the host or path of a Unix socket, the port, and the
    path below which a proxy has the server, of a server's URL."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        if parts.scheme != HTTP_UNIX:
            (parts.hostname or "").encode("idna")  # as connecting does
    except ValueError:
        parts, port = urllib.parse.urlsplit(""), None
    scheme, authority, path, *rest = parts
    valid = AUTHORITY.fullmatch(authority) and VISIBLE.fullmatch(url) and not any(rest)
    if scheme not in ("http", "https", HTTP_UNIX) or not valid:
        raise BadRequest(
            f"a server's URL must be like {DEFAULT_URL}, https://host/path or"
            f" {HTTP_UNIX}://%2Frun%2Flinger.sock, not {url}"
        )
    host = parts.hostname or ""
    if scheme == HTTP_UNIX:
        authority, host = "localhost", urllib.parse.unquote(authority)
    return scheme, authority, host, port, path.rstrip("/")


def _tls_context(cafile: Optional[str]) -> ssl.SSLContext:
    """Returns a context that trusts the certificates in a file, or else those of the system."""
    try:
        return ssl.create_default_context(cafile=cafile)
    except OSError as error:
        reason = reason_of(error)
        raise BadRequest(f"cannot read the certificates in {cafile}: {reason}") from error


class _Requests:
    """Sends the requests of a client, with its timeout, and decodes the responses."""

    def __init__(self, transport: Transport, timeout: float) -> None:
        self._transport = transport
        self._timeout = timeout

    def send(
        self, *parts: Any, wait: float = 0, **options: Any
    ) -> tuple[http.client.HTTPMessage, bytes]:
        """Sends a request, made of its parts as `Transport.encode` does, to which the server may
        respond after `wait`; `options` are those of `Transport.send`."""
        request = self._transport.encode(*parts)
        return self._transport.send(request, self._timeout + wait, **options)

    def send_json(
        self, convert: Callable[..., T], *request: Any, header: str = "", **options: Any
    ) -> T:
        """Sends a request; returns the JSON of its response, converted, with a `header` if that
        is named."""
        headers, body = self.send(*request, **options)
        more = (headers.get(header, ""),) if header else ()
        with _decoding(self._transport.url):
            return convert(json.loads(body or b"null"), *more)

    def add(
        self,
        convert: Callable[..., T],
        path: str,
        content: tuple[bytes, str],
        retry: bool,
        query: dict[str, object],
        header: str = "",
    ) -> T:
        """Posts `content`, a body and its type; a dedup key makes the request repeatable."""
        if retry:
            query.setdefault("dedup", os.urandom(16).hex())
        headers = pop_own_headers(query)
        request = functools.partial(
            self.send_json, convert, "POST", path, query, *content, headers,
            header=header, repeatable="dedup" in query,
        )  # fmt: skip
        return self._transport.retry(request, self._timeout) if retry else request()

    def list_whole(self, channel: str) -> Iterator[dict[str, Any]]:
        """Yields all messages of a channel, as JSON objects with whole bodies, by their ids."""
        path = encode_path("channels", channel, "messages")
        after: Optional[int] = None
        while True:
            query = {"n": MAX_BATCH, "after": after, "whole": 1}
            page: list[dict[str, Any]] = self.send_json(list, "GET", path, query)
            yield from page
            if not page:
                break
            after = page[-1]["id"]


@contextlib.contextmanager
def _decoding(url: str) -> Iterator[None]:
    """Reports a response that cannot be decoded as an error of the server at `url`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LingerError(f"{url} does not respond as Linger does", 502) from error


# ---------------------------------------------------------------------------------------------
# Loops: what takes messages one after the other for a client, keeps the current one in flight, and
# acknowledges it.  Knows no sockets.
# ---------------------------------------------------------------------------------------------


def _give_back(client: Client, messages: Iterable[Message]) -> None:
    """Undoes deliveries; those for which that fails end with their timeout."""
    for message in messages:
        try:
            client.release(message, 0, uncounted=True)
        except (NotFound, Conflict):
            continue
        except LingerError as error:
            client._transport.warn(f"{message_name(message)} was not given back: {error}")
            return


def message_name(message: Message) -> str:
    """Returns what log lines call a message."""
    return f"message {message.id} of {message.channel}"


SERVER_IS_BACK = "the server responds again"
LEASE_LOST = "the message was deleted, or delivered again, meanwhile"


class _Deliveries:
    """The deliveries that a client's loops process and that are not settled yet.  Thread-safe.

    The function that processes a message may settle it by the client's methods; its loop learns
    of that here.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards `_deadlines`
        self._deadlines: dict[Delivery, float] = {}  # monotonic time until which each is touched

    @locked
    def add(self, message: Message, deadline: float) -> None:
        """Adds the delivery of a message."""
        self._deadlines[delivery_of(message)] = deadline

    @locked
    def discard(self, id: int, lease: Optional[int]) -> None:
        """Removes a delivery; without a lease, each delivery of that message."""
        for settled in [d for d in self._deadlines if d[0] == id and lease in (None, d[1])]:
            del self._deadlines[settled]

    @locked
    def check_deadline(self, id: int, lease: Optional[int]) -> None:
        """`Conflict` if a delivery may not be touched any more."""
        if time.monotonic() > self._deadlines.get((id, lease), NEVER):
            raise Conflict(
                f"message {id} has been processed for its `max_time`: it is kept no more"
            )

    @locked
    def __contains__(self, message: Message) -> bool:
        return delivery_of(message) in self._deadlines


class Outage:
    """Reports once, for all loops of a worker, that something fails, and that it works again."""

    def __init__(self, warn: Callable[[str], None], end: str) -> None:
        """`end` is what is reported at the end."""
        self._warn = warn
        self._end = end
        self._lock = threading.RLock()  # guards `_begun`
        self._begun = False

    def begin(self, error: object) -> None:
        """It fails, and another try follows."""
        if not self._note(True):
            self._warn(f"{error}; trying again")

    def end(self, more: str = "") -> None:
        """It works; `more` is reported too."""
        if self._note(False):
            self._warn(self._end + more)

    @locked
    def _note(self, begun: bool) -> bool:
        known, self._begun = self._begun, begun
        return known


class _ConsumerLoop:
    """Takes messages one after the other; taking the next acknowledges the current one.

    It belongs to one thread.  A heartbeat thread of its own, which only reads the loop's state,
    touches the current message before its timeout.
    """

    def __init__(
        self,
        client: Client,
        channels: ChannelNames,
        wait: Optional[int],
        timeout: Optional[int],
        stop: threading.Event,
        outage: Outage,
        max_time: Optional[float] = None,
    ) -> None:
        """`outage` reports errors that are retried; `max_time` is as of `Client.work`."""
        if max_time is not None and max_time <= 0:
            raise BadRequest("max_time must be more than 0 seconds")
        self._client = client
        self._take = functools.partial(client.get, channels, wait, timeout, stop=stop)
        self._once = wait == 0
        self._stop = stop
        self._outage = outage
        self._max_time = NEVER if max_time is None else max_time
        self.on_lease_lost: Callable[[Message], None] = self._warn_of_lost_lease
        self._lost: Optional[Message] = None  # the last one for which that was called
        self._current: Optional[tuple[Message, float]] = None  # the message, and its arrival time
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._heartbeat, name="linger-heartbeat", daemon=True)
        self._heart.start()

    def next(self) -> Optional[Message]:
        """Acknowledges the current message, unless it is settled, and takes the next one.

        Returns None when `stop` is set, or without a wait when there is no message.  With a wait,
        errors of the server and the network are retried.  A current message that is missing or
        was delivered again needs no acknowledgement.
        """
        delays = _retry_delays()
        while not self._stop.is_set():
            done = self._unsettled()
            try:
                message = self._take(ack=done)
            except LingerError as error:
                if done is not None and isinstance(error, (NotFound, Conflict)):
                    self._lease_lost(done)
                    self._set_current(None)
                elif error.status < 500 or self._once or self._client._transport.closed:
                    self.ack_current()
                    raise
                elif not self._stop.is_set():
                    self._outage.begin(error)
                    self._stop.wait(next(delays))
                continue
            self._outage.end()
            self._set_current(message)
            delays = _retry_delays()
            if message is not None or self._once:
                return message
        self.ack_current()
        return None

    def process(
        self, function: Callable[[Message], T], message: Message, delay: int
    ) -> Optional[T]:
        """Calls a function with the current message; if it raises, releases the message."""
        try:
            return function(message)
        except BaseException as error:
            failed = isinstance(error, Exception)
            if failed:
                client_logger().error("%s failed", message_name(message), exc_info=True)
            self.release(traceback.format_exc(), None if message.backoff else delay)
            if not failed:
                raise
            return None

    def ack_current(self) -> None:
        """Deletes the current message, unless it is settled."""
        self._settle(self._client.delete)

    def release(self, reason: str, delay: Optional[int] = None, uncounted: bool = False) -> None:
        """Releases the current message, unless it is settled; keeps the end of a long reason."""
        end = reason.encode("utf-8", "replace")[-MAX_REASON:].decode("utf-8", "ignore")
        self._settle(self._client.release, delay, end, None, uncounted)

    def reject(self, reason: str) -> None:
        """Rejects the current message, unless it is settled."""
        self._settle(self._client.reject, reason)

    def reply(self, body: bytes) -> None:
        """Replies to the current message, unless it is settled; rejects it if that is too long."""

        def reply(message: Message) -> None:
            try:
                self._client.reply(message, body)
            except TooLarge as error:
                self._client.reject(message, str(error))

        self._settle(reply)

    def close(self) -> None:
        """Stops the heartbeat thread."""
        self._set_current(None)
        self._closed.set()
        self._heart.join()

    def _unsettled(self) -> Optional[Message]:
        """Returns the current message, unless its delivery was settled through the client."""
        current = self._current
        if current is not None and current[0] in self._client._unsettled:
            return current[0]
        return None

    def _set_current(self, message: Optional[Message]) -> None:
        if self._current is not None:
            self._client._unsettled.discard(*delivery_of(self._current[0]))
        if message is None:
            self._current = None
        else:
            now = time.monotonic()
            self._client._unsettled.add(message, now + self._max_time)
            self._current = (message, now)

    def _settle(self, method: Callable[..., None], *arguments: object) -> None:
        """Settles the current message; if that fails, it returns after its timeout."""
        message = self._unsettled()
        if message is None:
            return
        settle = functools.partial(method, message, *arguments)
        try:
            self._client._transport.retry(settle, self._client.timeout)
        except (NotFound, Conflict):
            self._lease_lost(message)
        except LingerError as error:
            text = f"{message_name(message)} comes again after its timeout: {error}"
            self._client._transport.warn(text)
        self._set_current(None)

    def _lease_lost(self, message: Message) -> None:
        if self._lost is not message:
            self._lost = message
            self.on_lease_lost(message)

    def _warn_of_lost_lease(self, message: Message) -> None:
        self._client._transport.warn(f"{message_name(message)}: {LEASE_LOST}")

    def _heartbeat(self) -> None:
        current, due = None, 0.0
        while not self._closed.wait(HEARTBEAT_INTERVAL):
            if current is not self._current:
                current = self._current
                due = current[1] + current[0].timeout / TOUCHES_PER_TIMEOUT if current else 0.0
            if current and due <= time.monotonic() and self._unsettled() is current[0]:
                due = time.monotonic() + self._touch(*current)

    def _touch(self, message: Message, arrived: float) -> float:
        """Touches a message unless its time is over; returns the seconds until the next touch."""
        if time.monotonic() > arrived + self._max_time:
            text = f"has been processed for {self._max_time:g} s: its lease ends"
            self._client._transport.warn(f"{message_name(message)} {text}")
            return NEVER
        try:
            self._client.touch(message, message.timeout)
        except (NotFound, Conflict):
            self._lease_lost(message)
            return NEVER
        except LingerError:
            return 0.0
        return message.timeout / TOUCHES_PER_TIMEOUT


def _run_loops(
    new_loop: Callable[[], _ConsumerLoop],
    process: Callable[[_ConsumerLoop, Message], object],
    threads: int,
    stop: threading.Event,
) -> None:
    """Runs a loop in each of some threads until all end; raises the error that ended one."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with contextlib.closing(new_loop()) as loop:
                while (message := loop.next()) is not None:
                    process(loop, message)
        except BaseException as error:
            failures[:] = [error]
            stop.set()

    workers = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    with _stopping_on_signals(stop):
        try:
            for worker in workers:
                worker.start()
        except RuntimeError as error:  # the system allows no more threads
            failures.append(error)
            stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    if failures:
        raise failures.pop()  # not failures[0]: the list and the traceback would form a cycle


def stop_signals() -> list[int]:
    """Returns the signals that end a worker in good order.

    SIGHUP, the end of its terminal, is one unless it is ignored (`nohup`) or handled.
    """
    numbers: list[int] = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL:
        numbers.append(hangup)
    return numbers


@contextlib.contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Lets each of `stop_signals` set `stop`; a second SIGTERM or SIGINT has its former effect.

    A SIGHUP does not end the process even then: the shell and the system may send one each, also
    beside SIGTERM.  Does nothing outside the main thread, which alone may set signal handlers.
    """
    former: dict[int, Any] = {}

    def restore(*numbers: int) -> None:
        for number in numbers:
            signal.signal(number, former[number])

    def stop_once(number: int, _: object) -> None:
        stop.set()
        if number in (signal.SIGTERM, signal.SIGINT):
            restore(signal.SIGTERM, signal.SIGINT)

    if threading.current_thread() is threading.main_thread():
        for number in stop_signals():
            former[number] = signal.signal(number, stop_once) or signal.SIG_DFL
    try:
        yield
    finally:
        restore(*former)


# ---------------------------------------------------------------------------------------------
# Client: the HTTP API as methods.  Blocking and thread-safe.  Knows no sockets.
# ---------------------------------------------------------------------------------------------

JsonObjects = list[dict[str, Any]]


class CallReply(NamedTuple):
    """The reply to a call."""

    body: bytes
    type: str  # its Content-Type

    @property
    def text(self) -> str:
        """The body decoded as UTF-8; raises UnicodeDecodeError."""
        return self.body.decode("utf-8")

    def json(self) -> Any:
        """The body parsed as JSON; raises ValueError."""
        return json.loads(self.body)


class Copies(dict[str, T]):
    """The ids of a publication's copies by channel, or of a batch a list of them."""

    publications = range(0)  # the ids of the publications, if the topic keeps them


def copies_from(value: dict[str, T], kept: str) -> Copies[T]:
    """The copies in the response to a publication, and its PUBLICATION_HEADER."""
    copies = Copies({channel: ids for channel, ids in value.items() if ids is not True})
    if kept:
        first, _, last = kept.partition("-")
        copies.publications = range(int(first), int(last or first) + 1)
    return copies


class LiveEvent(NamedTuple):
    """What has happened to a message."""

    name: str  # posted, delivered, ...; of a topic: published
    message: Message  # of a publication, only its topic, type, headers and body
    source: str  # the channel where a message was that has `moved`
    gap: bool  # whether events before this one may be missing


class ManagementClient:
    """The calls of a client that neither produce nor consume; used through `Client`."""

    def __init__(
        self,
        url: Optional[str] = None,
        token: Optional[str] = None,
        timeout: float = CLIENT_TIMEOUT,
        *,
        cafile: Optional[str] = None,
        name: str = "",
    ) -> None:
        """Opens no connection yet.

        `url` and `token`: by default LINGER_URL and LINGER_TOKEN of the environment.  `timeout`:
        seconds that connecting may take and that the server may be silent, in addition to the
        `wait` of a call.  `cafile`: certificates to trust for https instead of the system's.
        `name`: what listings show as the `holder` of the messages that it takes.
        """
        self.url = (url or os.environ.get("LINGER_URL") or DEFAULT_URL).rstrip("/")
        self.timeout = timeout
        self.name = name
        token = token or os.environ.get("LINGER_TOKEN") or ""
        self._transport = Transport(self.url, token, timeout, cafile)
        self._requests = _Requests(self._transport, timeout)
        self._unsettled = _Deliveries()

    def close(self) -> None:
        """Closes all connections; later calls, and those that wait, fail."""
        self._transport.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- server

    def server_info(self) -> dict[str, Any]:
        """Returns `Linger`, `version`, `id` and `hostname` of the server."""
        return self._requests.send_json(dict, "GET", "/")

    def access(self) -> dict[str, Any]:
        """Returns the `rights` of the token, and whether its patterns have `restricted` them."""
        return self._requests.send_json(dict, "GET", "/access")

    def health(self) -> bool:
        """Returns whether the server responds and can store a message now."""
        try:
            return self._requests.send_json(
                lambda value: value["healthy"] is True, "GET", "/health"
            )
        except Unavailable:
            return False

    def stats(self) -> dict[str, Any]:
        """Returns the counters since the server's start, and the current totals."""
        return self._requests.send_json(dict, "GET", "/stats")

    def backup(self, path: str, force: bool = False) -> None:
        """Copies the server's database to a new file, from which a server can start.

        It is complete and on disk when this returns.  `Conflict` if the file exists; `force`
        replaces it, unless it is a database in use.
        """
        with atomic_write(path, force) as part, open(part, "wb") as file:
            self._requests.send("GET", "/backup", wait=MAX_WAIT, repeatable=False, into=file)

    # -- channels and topics

    def channels(self) -> list[str]:
        """Returns the sorted names of channels with messages, subscriptions or consumers."""
        return self._requests.send_json(lambda value: list(value["channels"]), "GET", "/channels")

    def channel_infos(
        self, n: int = 0, after: str = "", like: str = "", order: str = ""
    ) -> JsonObjects:
        """Returns the `info` of each channel, or of some, as `GET /channels?info` does."""
        query = {"info": 1, **({"n": n} if n else {}), "after": after, "like": like, "order": order}
        return self._requests.send_json(
            lambda value: list(value["channels"]), "GET", "/channels", query
        )

    def drained(self, channel: str, wait: int = DEFAULT_WAIT) -> bool:
        """Returns whether a channel holds no message, in any state, within `wait` seconds."""
        path = encode_path("channels", channel, "drained")
        try:
            self._requests.send("GET", path, {"wait": wait}, wait=wait)
        except LingerError as error:
            if error.status != http.HTTPStatus.REQUEST_TIMEOUT:
                raise
            return False
        return True

    def info(self, channel: str) -> dict[str, Any]:
        """Returns the counts, consumers, subscriptions and settings of a channel."""
        return self._requests.send_json(dict, "GET", encode_path("channels", channel, "info"))

    def channel_stats(self, channel: str) -> dict[str, int]:
        """Returns how many messages of a channel are `ready` and how many `hidden`."""
        return self._requests.send_json(dict, "GET", encode_path("channels", channel, "stats"))

    def topics(self, channel: Optional[str] = None) -> list[str]:
        """Returns the sorted topics with subscriptions: those of one channel, or all."""
        path = "/topics" if channel is None else encode_path("channels", channel, "topics")
        return self._requests.send_json(lambda value: list(value["topics"]), "GET", path)

    def subscribers(self, topic: str) -> list[str]:
        """Returns the sorted channels subscribed to a topic, but not those to a pattern."""
        path = encode_path("topics", topic, "channels")
        return self._requests.send_json(lambda value: list(value["channels"]), "GET", path)

    def pattern_subscribers(self, topic: str) -> dict[str, list[str]]:
        """Returns the patterns that match a topic, and the channels subscribed to each."""
        path = encode_path("topics", topic, "channels")
        return self._requests.send_json(lambda value: dict(value.get("patterns", {})), "GET", path)

    def subscribe(
        self, channel: str, topic: str, since: Optional[str] = None, **given: Unpack[MessageFields]
    ) -> None:
        """Subscribes a channel to a topic, or changes a subscription: copies get what is `given`.

        `since`: copies also what the topic has kept: `all`, what came after an id, or as `5m`;
        but nothing to a channel that is subscribed already.
        """
        path = encode_path("channels", channel, "topics", topic)
        query = {**encode_parameters(MESSAGE_PARAMETERS, given), "since": since}
        self._requests.send("PUT", path, query)

    def unsubscribe(self, channel: str, topic: str) -> None:
        """Ends a subscription; no error if there is none."""
        self._requests.send("DELETE", encode_path("channels", channel, "topics", topic))

    def topic_settings(self, topic: str) -> dict[str, int]:
        """Returns what is set for a topic: `keep`, `keep-for`."""
        return self._requests.send_json(dict, "GET", encode_path("topics", topic, "settings"))

    def set_topic_settings(
        self, topic: str, keep: Optional[int] = None, keep_for: Optional[int] = None
    ) -> None:
        """Keeps the last `keep` publications of a topic, each for up to `keep_for` seconds."""
        path = encode_path("topics", topic, "settings")
        self._requests.send("PUT", path, {"keep": keep, "keep-for": keep_for})

    def clear_topic_settings(self, topic: str) -> None:
        """Keeps no publications any more, and deletes those that were kept."""
        self._requests.send("DELETE", encode_path("topics", topic, "settings"))

    def publications(self, topic: str, since: str = "all", n: int = LISTED) -> JsonObjects:
        """Returns up to `n` of what a topic has kept, as `GET /topics/<topic>/messages` does."""
        path = encode_path("topics", topic, "messages")
        kept: JsonObjects = []
        while n > len(kept):
            query = {"since": since, "n": min(n - len(kept), MAX_BATCH), "whole": 1}
            page: JsonObjects = self._requests.send_json(list, "GET", path, query)
            if not page:
                break
            kept += page
            since = str(page[-1]["id"])
        return kept

    def subscribe_pattern(
        self, channel: str, pattern: str, **parameters: Unpack[MessageFields]
    ) -> None:
        """Subscribes a channel to all topics that match a pattern of words with dots between:
        `*` is one word, `#` any number of words.  Copies get `parameters`."""
        path = encode_path("channels", channel, "patterns", pattern)
        self._requests.send("PUT", path, encode_parameters(MESSAGE_PARAMETERS, parameters))

    def unsubscribe_pattern(self, channel: str, pattern: str) -> None:
        """Ends a subscription to a pattern; no error if there is none."""
        self._requests.send("DELETE", encode_path("channels", channel, "patterns", pattern))

    def patterns(self, channel: Optional[str] = None) -> list[str]:
        """Returns the sorted patterns with subscriptions: those of one channel, or all."""
        path = "/patterns" if channel is None else encode_path("channels", channel, "patterns")
        return self._requests.send_json(lambda value: list(value["patterns"]), "GET", path)

    def settings(self, channel: str) -> dict[str, Any]:
        """Returns the settings of a channel that are set."""
        return self._requests.send_json(dict, "GET", encode_path("channels", channel, "settings"))

    def set_settings(self, channel: str, **parameters: Unpack[ChannelFields]) -> None:
        """Replaces the settings of a channel: its `hlm`, and the defaults of messages posted."""
        path = encode_path("channels", channel, "settings")
        self._requests.send("PUT", path, encode_parameters(CHANNEL_PARAMETERS, parameters))

    def change_settings(self, channel: str, **parameters: Unpack[ChannelFields]) -> None:
        """Sets some of the settings of a channel, and leaves the others as they are."""
        path = encode_path("channels", channel, "settings")
        self._requests.send("PATCH", path, encode_parameters(CHANNEL_PARAMETERS, parameters))

    def clear_settings(self, channel: str) -> None:
        """Clears the settings of a channel; no error if there are none."""
        self._requests.send("DELETE", encode_path("channels", channel, "settings"))

    def pause(self, channel: str, seconds: Optional[int] = None) -> None:
        """Stops the delivery of a channel's messages for some seconds, or until `resume`."""
        self._requests.send("PUT", encode_path("channels", channel, "pause"), {"for": seconds})

    def resume(self, channel: str) -> None:
        """Ends a pause; no error if there is none."""
        self._requests.send("DELETE", encode_path("channels", channel, "pause"))

    # -- schedules

    def schedule(
        self,
        name: str,
        channel: str,
        body: object,
        type: Optional[str] = None,
        *,
        cron: Optional[str] = None,
        tz: Optional[str] = None,
        every: Optional[int] = None,
        catch_up: bool = True,
        **parameters: Unpack[PostFields],
    ) -> None:
        """Has a message posted to a channel at the times of a `cron` expression, by the wall clock
        of a time zone (`tz`, by default UTC), or `every` so many seconds.

        `body`, `type` and `parameters` are as for `post`; replaces the schedule of that name.
        After a downtime there is one post for all times that were missed, or with `catch_up=False`
        none.
        """
        query = encode_parameters(SCHEDULE_PARAMETERS, parameters)
        headers = pop_own_headers(query)
        query.update(channel=channel, cron=cron, tz=tz, every=every)
        query["catch-up"] = "yes" if catch_up else "no"
        path = encode_path("schedules", name)
        self._requests.send("PUT", path, query, *encode_message(body, type), headers)

    def schedules(self) -> JsonObjects:
        """Returns all schedules, by name, as `GET /schedules` does."""
        return self._requests.send_json(lambda value: list(value["schedules"]), "GET", "/schedules")

    def read_schedule(self, name: str) -> dict[str, Any]:
        """Returns a schedule with its whole body, as `GET /schedules/<name>` does; `NotFound`."""
        return self._requests.send_json(dict, "GET", encode_path("schedules", name))

    def unschedule(self, name: str) -> None:
        """Deletes a schedule; `NotFound`."""
        self._requests.send("DELETE", encode_path("schedules", name), done=[NotFound])

    def run_schedule(self, name: str) -> PostResult:
        """Posts the message of a schedule now; its due times stay as they are."""
        return self._requests.send_json(
            lambda value: PostResult(value["id"], value.get("duplicate", False)),
            "POST", encode_path("schedules", name, "run"), repeatable=False,
        )  # fmt: skip

    # -- inspection

    def read_message(self, id: int) -> tuple[Message, str]:
        """Returns a message and its state (of `STATES`) without taking it; `NotFound`."""
        headers, body = self._requests.send("GET", f"/messages/{id}")
        with _decoding(self.url):
            return parse_headers(headers, body)

    def list_messages(
        self,
        channel: str,
        state: Optional[str] = None,
        n: int = LISTED,
        after: Optional[int] = None,
    ) -> list[tuple[Message, str]]:
        """Returns up to `n` messages of a channel with their states, after the message `after`.

        In the order of delivery for the state `ready`, else by id.  A body is cut to PREVIEW_BYTES
        bytes, at a whole character.
        """
        return self._requests.send_json(
            parse_listing, "GET", encode_path("channels", channel, "messages"),
            {"state": state, "n": n, "after": after},
        )  # fmt: skip

    def dead_letters(
        self, n: int = LISTED, after: Optional[int] = None, reason: str = "", order: str = ""
    ) -> list[tuple[Message, str]]:
        """Returns up to `n` dead letters of all channels with their states, after the message
        `after`: `newest` (the default) or `oldest` first, of one `reason` or all."""
        query = {"n": n, "after": after, "reason": reason, "order": order}
        return self._requests.send_json(parse_listing, "GET", "/dead-letters", query)

    # -- moving and changing messages

    def redrive(self, channel: str, n: Optional[int] = None, to: Optional[str] = None) -> int:
        """Moves up to `n` (None: all) ready messages of a dead channel, in order, to where they
        came from, or all to the channel `to`; returns how many."""
        return self._requests.send_json(
            lambda value: int(value["moved"]),
            "POST", encode_path("channels", channel, "redrive"), {"n": n, "to": to},
            repeatable=False, wait=BULK_WAIT,
        )  # fmt: skip

    def redrive_message(self, id: int, to: Optional[str] = None) -> None:
        """Moves a dead letter back to where it came from, or a message to the channel `to`."""
        path = f"/messages/{id}/redrive"
        self._requests.send("POST", path, {"to": to}, repeatable=False)

    def change(self, id: int, **parameters: Unpack[MessageFields]) -> None:
        """Changes the priority, delay, timeout, dead channel or limit of deliveries of a message
        that waits.  `NotFound`, or `Conflict` while it is in flight."""
        query = encode_parameters(CHANGE_PARAMETERS, parameters)
        self._requests.send("PATCH", f"/messages/{id}", query)

    def drain(self, channel: str) -> None:
        """Deletes all messages of a channel, in every state, and its dedup keys."""
        self._requests.send("DELETE", encode_path("channels", channel), wait=BULK_WAIT)

    # -- dumps

    def dump(self, channels: Optional[ChannelNames] = None) -> Iterator[dict[str, Any]]:
        """Yields the messages of some channels, or of all, as JSON records for `load`.

        By channel and id.  A record has `channel`, `type`, `body` (`encoding` is base64 if it is
        not text) and the parameters that are not the default; `delay` and `linger` are the
        remaining seconds.  A message in flight is dumped as ready.  Nothing is taken.
        """
        for channel in self.channels() if channels is None else list_names(channels):
            yield from map(dumped_record, self._requests.list_whole(channel))

    def load(self, records: Iterable[Mapping[str, Any]]) -> int:
        """Posts the records of a `dump` in order, with new ids; returns how many.

        They are posted in batches, each all or none, which are sent again if necessary.  An error
        has the `index` of its record; the batches before it have been posted.
        """
        count = 0
        try:
            for channel, items in in_batches(records):
                body = b"[" + b",".join(items) + b"]"
                path = encode_path("channels", channel, "batch")
                self._requests.add(dict, path, (body, JSON_TYPE), True, {})
                count += len(items)
        except LingerError as error:
            if error.index is not None:
                error.index += count
            raise
        return count


class Client(ManagementClient):
    """A Linger server; the methods have the names of the broker's.  Thread-safe.

    Each thread has its own connection, which is kept open and opened again when the server has
    closed it.  A `message` is either a `Message`, and then the call succeeds only while that
    delivery is the latest, or an id.  Errors are those of the broker; `Unavailable` also means
    that the server cannot be reached.
    """

    # -- producing

    def post(
        self,
        channel: str,
        body: object,
        type: Optional[str] = None,
        retry: bool = False,
        **parameters: Unpack[PostFields],
    ) -> PostResult:
        """Adds a message to a channel; it is on disk when this returns.

        `body`: bytes (text/plain, unless `type` says otherwise), a str (in UTF-8, as text/plain;
        charset=utf-8), or anything else, as JSON.  `parameters`: those of a message, with `_` for
        `-`.  `retry`: send it again for up to `timeout` seconds until the server responds; a
        `dedup` key ensures that it is added once.
        """
        keyed = "dedup" in parameters or "unique" in parameters  # not only because of `retry`
        return self._requests.add(
            lambda value: PostResult(value["id"], keyed and value.get("duplicate", False)),
            encode_path("channels", channel), encode_message(body, type), retry,
            encode_parameters(ALL_PARAMETERS, parameters),
        )  # fmt: skip

    def post_batch(
        self, channel: str, bodies: Iterable[Item], retry: bool = False, **given: Unpack[PostFields]
    ) -> list[int]:
        """Adds up to 1,000 messages to a channel in order, all or none; returns their ids.

        Each is a body as for `post`, or a tuple `(body, type, parameters)`.  `given`: default
        parameters of all; `retry` is as for `post`.  The error of a bad item has its `index`.
        """
        return self._requests.add(
            lambda value: list(value["ids"]),
            encode_path("channels", channel, "batch"), encode_batch(bodies, ALL_PARAMETERS), retry,
            encode_parameters(ALL_PARAMETERS, given),
        )  # fmt: skip

    def publish(
        self,
        topic: str,
        body: object,
        type: Optional[str] = None,
        retry: bool = False,
        **keys: Unpack[PublishKeys],
    ) -> Copies[int]:
        """Adds a copy of a message to each channel subscribed to a topic; returns ids by channel.

        `body`, `type` and `retry` are as for `post`; `keys`: `dedup` and `dedup_for`.  A channel
        at its high-level mark is left out.
        """
        return self._requests.add(
            copies_from, encode_path("topics", topic), encode_message(body, type), retry,
            encode_parameters(SINGLE_PARAMETERS, keys), PUBLICATION_HEADER,
        )  # fmt: skip

    def publish_batch(
        self, topic: str, bodies: Iterable[Item], retry: bool = False, **keys: Unpack[PublishKeys]
    ) -> Copies[list[int]]:
        """Publishes up to 1,000 messages, as `post_batch`; returns the copies' ids by channel."""
        return self._requests.add(
            copies_from, encode_path("topics", topic, "batch"),
            encode_batch(bodies, SINGLE_PARAMETERS), retry,
            encode_parameters(SINGLE_PARAMETERS, keys), PUBLICATION_HEADER,
        )  # fmt: skip

    def call(
        self,
        channel: str,
        body: object,
        wait: int = CALL_WAIT,
        type: Optional[str] = None,
        **parameters: Unpack[PostFields],
    ) -> CallReply:
        """Posts a message and waits up to `wait` seconds for the reply to it.

        `LingerError` with status 502 if it was given up, 504 if no reply came.
        """
        query = encode_parameters(ALL_PARAMETERS, parameters)
        own = pop_own_headers(query)
        headers, reply = self._requests.send(
            "POST", encode_path("channels", channel, "call"), {**query, "wait": wait},
            *encode_message(body, type), own, wait=wait, repeatable=False,
        )  # fmt: skip
        return CallReply(reply, headers["content-type"])

    # -- consuming

    def get(
        self,
        channels: ChannelNames,
        wait: Optional[int] = None,
        timeout: Optional[int] = None,
        ack: Optional[MessageOrId] = None,
        lease: Optional[int] = None,
        auto: bool = False,
        stop: Optional[threading.Event] = None,
    ) -> Optional[Message]:
        """Takes the next message of a channel, or of the first of several that has one.

        Waits for one for up to `wait` seconds (None: 120); returns None if none arrives.
        `timeout`: seconds that it stays hidden, in place of its own.  `ack`: a message to delete
        before, in the same transaction; if that fails (`NotFound`, `Conflict`) none is taken.
        `auto`: delete the message on delivery.  `stop`: set by another thread, it ends the wait
        within a second; a message that comes just then goes back uncounted, unless with `auto`.
        """
        messages = self.get_batch(channels, 1, wait, timeout, ack, lease, auto, stop)
        return messages[0] if messages else None

    def get_batch(
        self,
        channels: ChannelNames,
        n: int,
        wait: Optional[int] = None,
        timeout: Optional[int] = None,
        ack: Optional[MessageOrId] = None,
        lease: Optional[int] = None,
        auto: bool = False,
        stop: Optional[threading.Event] = None,
    ) -> list[Message]:
        """Takes up to `n` messages (1 to 1,000), as many as are ready once one is; see `get`."""
        if stop is not None and stop.is_set():
            if ack is not None:
                self.delete(ack, lease)
            return []
        path = "/channels/" + ",".join(encode_path(name)[1:] for name in list_names(channels))
        query: dict[str, object] = {"n": n, "wait": wait, "timeout": timeout}
        query["as"] = self.name or None
        if ack is not None:
            query["ack"], query["lease"] = delivery_of(ack, lease)
        if auto:
            query["auto"] = "yes"
        try:
            messages = self._requests.send_json(
                lambda value: [parse_message(item) for item in value or ()],
                "GET", path, query, wait=DEFAULT_WAIT if wait is None else wait, repeatable=False,
                stop=stop,
            )  # fmt: skip
        except Unavailable:
            if stop is None or not stop.is_set():
                raise
            messages = []  # the server has closed the connection,
            if ack is not None:  # probably after it has deleted that message
                with contextlib.suppress(NotFound):
                    self.delete(ack, lease)
        if stop is not None and stop.is_set() and not auto:
            _give_back(self, messages)
            return []
        return messages

    # -- acknowledging

    def delete(self, message: MessageOrId, lease: Optional[int] = None) -> None:
        """Deletes a message that is done; `NotFound`, or `Conflict` if it was delivered again."""
        self._settle("delete", delivery_of(message, lease))

    def delete_batch(
        self, messages: Iterable[MessageOrId]
    ) -> tuple[list[int], list[int], list[int]]:
        """Deletes up to 1,000 messages; returns the ids deleted, in conflict, and missing."""
        deliveries = [delivery_of(message) for message in messages]
        body = TO_JSON([{"id": id, "lease": lease} for id, lease in deliveries]).encode()
        result = self._requests.send_json(
            lambda value: (value["deleted"], value["conflict"], value["missing"]),
            "POST", "/messages/delete", None, body, JSON_TYPE,
        )  # fmt: skip
        for id, lease in deliveries:
            if id not in result[1]:
                self._unsettled.discard(id, lease)
        return result

    def reply(
        self,
        message: MessageOrId,
        body: object,
        type: Optional[str] = None,
        lease: Optional[int] = None,
    ) -> None:
        """Answers a message that was called, and deletes it.  Errors as for `delete`, and
        `Conflict` if nobody has called it."""
        id, lease = delivery_of(message, lease)
        content = encode_message(body, type)
        path = f"/messages/{id}/reply"
        self._requests.send("POST", path, {"lease": lease}, *content, repeatable=False)
        self._unsettled.discard(id, lease)

    def touch(
        self, message: MessageOrId, timeout: Optional[int] = None, lease: Optional[int] = None
    ) -> None:
        """Restarts the visibility timeout of a message in flight, from now.

        `timeout`: seconds, in place of the message's own.  `NotFound`, or `Conflict` if the
        message is not in flight, was delivered again, or has been in `work` for its `max_time`.
        """
        id, lease = delivery_of(message, lease)
        self._unsettled.check_deadline(id, lease)
        self._requests.send("POST", f"/messages/{id}/touch", {"lease": lease, "timeout": timeout})

    def release(
        self,
        message: MessageOrId,
        delay: Optional[int] = None,
        reason: str = "",
        lease: Optional[int] = None,
        uncounted: bool = False,
    ) -> None:
        """Returns a message in flight: ready after `delay` seconds, its backoff, or at once.

        `reason`: up to 4,096 bytes in UTF-8, shown to the next consumer.  `uncounted`: as if it
        had not been delivered, so without backoff; needs a lease.  Errors as for `touch`.
        """
        delivery = delivery_of(message, lease)
        self._settle("release", delivery, reason, delay=delay, uncounted=uncounted or None)

    def reject(self, message: MessageOrId, reason: str = "", lease: Optional[int] = None) -> None:
        """Moves a message in flight to its dead channel, or deletes it.  Errors as for `touch`."""
        self._settle("reject", delivery_of(message, lease), reason)

    # -- workers

    def work(
        self,
        channels: ChannelNames,
        function: Callable[[Message], object],
        threads: int = 1,
        wait: Optional[int] = None,
        timeout: Optional[int] = None,
        delay: int = FAILURE_DELAY,
        stop: Optional[threading.Event] = None,
        max_time: Optional[float] = None,
    ) -> None:
        """Calls a function with each message, in `threads` threads, until it is stopped.

        When the function returns, the message is deleted.  When it raises, the message is released
        with the traceback as the reason, for its backoff or else for `delay` seconds.  The
        function may itself delete, release or reject it through this client.  While the function
        runs, the message is kept in flight, for up to `max_time` seconds and a timeout; after that
        `touch` raises `Conflict`.  The server may restart meanwhile.

        Ends after the current messages when `stop` is set, on SIGTERM, SIGINT or SIGHUP (in the
        main thread), or with a `wait` of 0 when there is no message.  Raises the errors that no
        retry can repair.  Exceptions of the function and outages go to the logger "linger".
        """
        threads = parse_integer("threads", threads, 1)
        stop = stop or threading.Event()
        outage = Outage(self._transport.warn, SERVER_IS_BACK)
        new_loop = functools.partial(
            _ConsumerLoop, self, channels, wait, timeout, stop, outage, max_time
        )
        _run_loops(
            new_loop, lambda loop, message: loop.process(function, message, delay), threads, stop
        )

    def consume(
        self,
        channels: ChannelNames,
        wait: Optional[int] = None,
        timeout: Optional[int] = None,
        stop: Optional[threading.Event] = None,
        max_time: Optional[float] = None,
    ) -> Iterator[Message]:
        """Yields the messages of channels, for a `for` loop.

        Asking for the next message deletes the current one; leaving the loop with `break` or an
        exception releases it.  The body of the loop may itself delete, release or reject it
        through this client.  Meanwhile the message is kept in flight, for up to `max_time` as in
        `work`, and the server may restart.  Ends after the current message when `stop` is set, or
        with a `wait` of 0 when there is no message.
        """
        stop = stop or threading.Event()
        outage = Outage(self._transport.warn, SERVER_IS_BACK)
        loop = _ConsumerLoop(self, channels, wait, timeout, stop, outage, max_time)
        with contextlib.closing(loop):
            while (message := loop.next()) is not None:
                try:
                    yield message
                except GeneratorExit:
                    loop.release("the loop was left before the message was done")
                    raise

    # -- live

    def live(
        self,
        channel: Optional[str] = None,
        topic: Optional[str] = None,
        stop: Optional[threading.Event] = None,
        *,
        pattern: Optional[str] = None,
        since: Optional[str] = None,
    ) -> Iterator[LiveEvent]:
        """Yields what happens to the messages of a channel, or what is published on a topic, or on
        those that match a pattern.

        `since`: begins with what the topics have kept: `all`, what came after an id, or as `5m`.
        Where a topic keeps its publications, those made while the connection was lost follow.
        Goes on forever, across restarts of the server, or until `stop` is set, which takes a few
        seconds.  Takes no message.  The first event after the connection was lost has `gap` set:
        what happened meanwhile may not be seen.  Raises the errors that no retry can repair.
        """
        items = self._live_items(channel, topic, stop or threading.Event(), pattern, since)
        for item, gap in items:
            message = parse_event(item)
            yield LiveEvent(item.get("event", "published"), message, item.get("from", ""), gap)

    def _live_items(
        self,
        channel: Optional[str],
        topic: Optional[str],
        stop: threading.Event,
        pattern: Optional[str],
        since: Optional[str],
    ) -> Iterator[tuple[dict[str, Any], bool]]:
        """Yields the events as JSON objects, each with its `gap`."""
        given = {"channels": channel, "topics": topic, "patterns": pattern}
        names = [(kind, name) for kind, name in given.items() if name is not None]
        if len(names) != 1:
            raise BadRequest("live needs either a channel, a topic or a pattern")
        path = encode_path(*names[0], "live")
        outage = Outage(self._transport.warn, SERVER_IS_BACK)
        delays, gap, is_kept = _retry_delays(), False, False
        while not stop.is_set():
            try:
                query = {} if since is None else {"since": since}
                for line in self._transport.stream(path, self.timeout + SILENCE_LIMIT, stop, query):
                    outage.end(": events may be missing" if gap else "")
                    delays = _retry_delays()
                    if line.strip():
                        item = json.loads(line)
                        is_kept = channel is None and "id" in item
                        if is_kept:
                            since = str(item["id"])
                        yield item, gap
                        gap = False
                error: object = f"{self.url} has ended the stream"
            except LingerError as failure:
                if failure.status < 500 or self._transport.closed:
                    raise
                error = failure
            gap = not is_kept or pattern is not None  # of which other topics may keep none
            if not stop.is_set():
                outage.begin(error)
                stop.wait(next(delays))

    # -- requests

    def _settle(self, action: str, delivery: Delivery, reason: str = "", **query: object) -> None:
        """Ends a delivery.  Repeatable if it deletes, or with a lease, which is valid only once."""
        id, lease = delivery
        done: list[type[LingerError]] = [NotFound]
        method, path = "DELETE", f"/messages/{id}"
        if action != "delete":
            method, path = "POST", f"{path}/{action}"
            done.append(Conflict)
        self._requests.send(
            method, path, {**query, "lease": lease}, encode_text(reason), DEFAULT_TYPE,
            repeatable=lease is not None or method == "DELETE", done=done,
        )  # fmt: skip
        self._unsettled.discard(id, lease)


# ---------------------------------------------------------------------------------------------
# Options: the table of the server's options, with values from arguments, environment and file.
# Creates a server with them and runs it until a signal.  Knows no other command.
# ---------------------------------------------------------------------------------------------


def _text(_: str, text: str) -> str:
    return text


def _sync_level(name: str, text: str) -> str:
    return check_choice(name, text, SYNC_LEVELS)


def _switch(name: str, text: str) -> bool:
    if text.lower() not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise BadRequest(f"{name} must be true or false")
    return text.lower() in ("true", "yes", "on", "1")


class Option(NamedTuple):
    """An option: `--name VALUE`, `LINGER_NAME` in the environment, `name = value` in a file."""

    name: str
    receiver: str  # the class that takes the value under the same name; empty: see _create_server
    default: Any
    parse: Callable[[str, str], Any]  # (source, text) to the value, or BadRequest
    metavar: str  # empty for a switch
    help: str

    @property
    def key(self) -> str:
        """The name in Python."""
        return self.name.replace("-", "_")

    def check(self, value: object) -> None:
        """`BadRequest` if it cannot have this value, given in Python and not as text."""
        kind = type(self.default) if self.default is not None else str
        seconds = self.metavar == "SECONDS" and isinstance(value, float) and value > 0
        path = self.metavar == "FILE" and isinstance(value, os.PathLike)
        if seconds or path or (value is None and self.default is None):
            return
        if type(value) is not kind:
            kinds = {int: "an integer", str: "a text", bool: "True or False"}
            raise BadRequest(f"{self.key} must be {kinds[kind]}")
        if kind is not bool:
            self.parse(self.key, cast(Any, value))


# fmt: off
OPTIONS = (
    Option("host", "Server", "127.0.0.1", _text, "ADDRESS",
           "address to listen on, or unix:PATH for a Unix socket"),
    Option("port", "Server", 8989, integer_from(0, 65_535), "PORT",
           "port to listen on, 0 = any free port"),
    Option("dbfile", "", "linger.db", _text, "FILE",
           "database file, or the URL of an rqlite cluster; :memory: = in memory only"),
    Option("sync", "", "full", _sync_level, "LEVEL",
           "full = on disk before the response; normal = shortly after, so that a power failure may"
           " lose the last changes; off = when the system writes it"),
    Option("hlm", "Broker", 0, integer_from(0), "N",
           "high-level mark: messages per channel, 0 = unlimited"),
    Option("max-message", "Broker", MAX_MESSAGE, integer_from(1, MAX_MESSAGE_OPTION), "BYTES",
           "maximum size of a message"),
    Option("max-connections", "Server", 0, integer_from(0, 1_000_000), "N",
           "open connections; further ones get 503; 0 = as many as fit a quarter of the memory, up"
           f" to {MAX_CONNECTIONS}"),
    Option("max-connections-per-address", "Server", 0, integer_from(0, 1_000_000), "N",
           "open connections per address (IPv6: per /64 network), 0 = unlimited"),
    Option("max-waiting", "Server", 0, integer_from(0, 1_000_000), "N",
           "waiting consumers; further ones get 503; 0 = 75% of --max-connections"),
    Option("max-memory", "Server", 0, integer_from(0), "BYTES",
           "memory for what clients send and receive; beyond it large requests get 503; 0 = a"
           " quarter of the machine's, up to 1 GB"),
    Option("max-channels", "Broker", MAX_CHANNELS, integer_from(1, 10_000_000), "N",
           "channels with messages, subscriptions, settings or a pause"),
    Option("metrics-channels", "Broker", METRICS_CHANNELS, integer_from(0, MAX_METRICS_CHANNELS),
           "N", "channels with counters of their own in /metrics"),
    Option("max-db-size", "", 0, integer_from(0), "BYTES",
           "size of the database, 0 = limited by the disk"),
    Option("read-timeout", "Server", READ_TIMEOUT, integer_from(1, 86_400), "SECONDS",
           "time limit for a request's head, and the same again for its body"),
    Option("idle-timeout", "Server", IDLE_TIMEOUT, integer_from(1, 86_400), "SECONDS",
           "time that a connection may be idle between requests"),
    Option("token", "Access", None, _text, "TOKEN", "token with full access"),
    Option("tokens", "Access", None, _text, "FILE", "token file; lines `name token rights ...`"),
    Option("no-auth", "Access", False, _switch, "",
           "listen on any address without tokens: everyone has full access"),
    Option("cors", "Access", "", _text, "ORIGINS",
           "web origins that may send requests, as https://a.example,... or *"),
    Option("allow-host", "Access", "", _text, "NAMES",
           "host names of this server in addition to localhost, separated by commas"),
    Option("cert", "Access", None, _text, "FILE", "TLS certificate in PEM format; enables https"),
    Option("key", "Access", None, _text, "FILE", "private key for --cert, if not in the same file"),
    Option("log-requests", "", False, _switch, "", "log each request to standard error"),
    Option("debug", "", False, _switch, "", "same as --log-requests, as in Linger 1.0.1"),
)
# fmt: on


# For a service named `linger`, Kubernetes and Docker links set LINGER_PORT=tcp://10.0.0.1:8989.
SERVICE_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://[^/]+:[0-9]+")  # no option looks so


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose texts keep their line breaks."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"linger: {message} (see {self.prog} --help)\n")

    def exit(self, status: int = 0, message: Optional[str] = None) -> NoReturn:
        if sys.stdout is not None:
            sys.stdout.flush()  # reports a closed pipe here, where `main` expects it
        super().exit(status, message)


def _option_parser(commands: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="linger",
        usage="linger [serve] [OPTIONS]\n       linger COMMAND ...\n       linger COMMAND --help",
        description="A message queue and pub-sub server with a plain HTTP API.\n\n"
        f"commands:\n{commands}",
        epilog="Each option is also LINGER_<NAME> in the environment and `name = value` in the\n"
        "file of --config; the command line has priority, then the environment.\n\n"
        "exit status:\n  0  stopped by SIGTERM or SIGINT\n  2  cannot start: the reason is a line"
        " on standard error",
    )
    for option in OPTIONS:
        flag, help = f"--{option.name}", option.help.replace("%", "%%")  # argparse formats it
        if not option.metavar:
            parser.add_argument(flag, nargs="?", const="true", metavar="BOOL", help=help)
            continue
        default = "" if option.default in (None, "") else f" (default: {option.default})"
        parser.add_argument(flag, metavar=option.metavar, help=help + default)
    parser.add_argument("--config", metavar="FILE", help="file with options")
    parser.add_argument(
        "--version", action="version", version=f"Linger {__version__}", help="show the version"
    )
    return parser


def read_config(path: str) -> dict[str, str]:
    """Returns the options in a file of lines `name = value`, by name.

    Sections, quotes and # comments are allowed, as in the files of Linger 1.0.1.  Those were
    Python; this executes nothing.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:  # as of a dbfile
            lines = file.read().splitlines()
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {reason_of(error)}") from error
    options = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith(("#", ";", "[")):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        name = name.replace("_", "-")
        if not equals or name not in {option.name for option in OPTIONS}:
            raise BadRequest(
                f"{path}, line {number}: expected `name = value` with an option's name"
            )
        quoted = re.fullmatch(r"""(["'])(.*?)\1\s*(?:#.*)?|(?!["'])([^#]*?)\s*(?:\s#.*)?""", value)
        if not quoted:
            raise BadRequest(f"{path}, line {number}: the quotes of the value do not match")
        options[name] = quoted[2] if quoted[1] else quoted[3]
    return options


def read_options(
    arguments: Sequence[str], environment: Mapping[str, str], commands: str = ""
) -> dict[str, Any]:
    """Returns the value of each option by its name in Python; `BadRequest` names a bad one.

    `commands`: the list of commands that `--help` shows.
    """
    given = vars(_option_parser(commands).parse_args(arguments))
    config = given["config"] or environment.get("LINGER_CONFIG")
    in_file = read_config(config) if config else {}
    options = {}
    for option in OPTIONS:
        variable = f"LINGER_{option.key.upper()}"
        value = environment.get(variable)
        sources = (
            (f"--{option.name}", given[option.key]),
            (variable, None if value and SERVICE_ADDRESS.fullmatch(value) else value),
            (f"{option.name} in {config}", in_file.get(option.name)),
        )
        found = ((source, text) for source, text in sources if text is not None)
        source, text = next(found, ("", None))
        options[option.key] = option.default if text is None else option.parse(source, text)
    return options


def _raise_file_limit(connections: int) -> int:
    """Raises the limit of open files for so many connections; returns how many it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + MAX_REFUSED_CONNECTIONS + SPARE_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == needed:
        return connections
    allowed = soft - min(MAX_REFUSED_CONNECTIONS + SPARE_DESCRIPTORS, soft // 2)
    log(f"linger: only {allowed} connections, because only {soft} files may be open (ulimit -n)")
    return allowed


def _create_server(options: Mapping[str, Any]) -> Server:
    """Returns a server with these options, not accepting yet.

    The database is opened last: a start that is refused for any other reason changes no file.
    """

    def of(receiver: str) -> dict[str, Any]:
        return {o.key: options[o.key] for o in OPTIONS if o.receiver == receiver}

    def open_broker() -> Broker:
        store = open_store(os.fspath(options["dbfile"]), options["sync"], options["max_db_size"])
        try:
            return Broker(store, **of("Broker"))
        except RuntimeError as error:
            store.close()
            raise Unavailable(f"cannot start without threads: {error} (ulimit -u)") from error

    return Server(
        open_broker,
        log_requests=options["log_requests"] or options["debug"],
        access=Access(**of("Access")),
        **of("Server"),
    )


if TYPE_CHECKING:

    class ServerOptions(TypedDict, total=False):
        """The values of OPTIONS, but those that `serve` names itself."""

        hlm: int
        max_message: int
        max_connections: int
        max_connections_per_address: int
        max_waiting: int
        max_memory: int
        max_channels: int
        metrics_channels: int
        read_timeout: float
        idle_timeout: float
        token: Optional[str]
        tokens: Union[str, os.PathLike[str], None]
        no_auth: bool
        cors: str
        allow_host: str
        cert: Union[str, os.PathLike[str], None]
        key: Union[str, os.PathLike[str], None]
        log_requests: bool
        debug: bool


def serve(
    host: str = "127.0.0.1",
    port: int = 0,
    dbfile: Union[str, os.PathLike[str]] = MEMORY,
    sync: str = "full",
    max_db_size: int = 0,
    **options: Unpack[ServerOptions],
) -> Server:
    """A server that runs in a thread of its own, in this process, until `with` or `close` ends it.

        with linger.serve() as server:
            print(server.url)

    `options` are those of the command line, with `_` for `-`; `BadRequest` names one that is
    unknown or has a wrong value.
    """
    own = {"host": host, "port": port, "dbfile": dbfile, "sync": sync, "max_db_size": max_db_size}
    given: dict[str, object] = {**own, **options}
    values = {option.key: option.default for option in OPTIONS}
    check_names("option", given, values)
    for option in OPTIONS:
        option.check(given.get(option.key, option.default))
    require_posix("a server of Linger")
    server = _create_server({**values, **given})
    threading.Thread(target=server.serve_forever, name="linger-server", daemon=True).start()
    return server


def _tune_threads() -> None:
    """Prepares the process for many threads, of which the interpreter runs one at a time.

    A woken thread must wait for the interpreter's lock, so it should neither preempt the running
    thread nor ask for the lock often: a thousand waiting threads that ask 200 times a second keep
    a core busy.
    """
    threading.stack_size(STACK_SIZE)
    sys.setswitchinterval(SWITCH_INTERVAL)
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class ServiceManager:
    """Tells systemd the state of a server of `Type=notify` (sd_notify(3)), if it has started it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = re.sub("^@", "\0", address)  # an abstract one (unix(7))
        self.watchdog = 0.0  # seconds until it restarts a server that sends no sign of life
        pid = str(os.getpid())
        if address and environment.get("WATCHDOG_PID", pid) == pid:
            with contextlib.suppress(ValueError):
                self.watchdog = int(environment.get("WATCHDOG_USEC", "0")) / 1e6

    def notify(self, *assignments: str) -> None:
        """Sends some of what sd_notify(3) names."""
        if self._address:
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
            ):
                sender.settimeout(NOTIFY_TIMEOUT)
                sender.sendto("\n".join(assignments).encode(), self._address)

    def reload(self, server: Server) -> None:
        """Lets a server read its files again."""
        self.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1_000}")
        server.reload()
        self.notify("READY=1")

    def watch(self, server: Server) -> None:
        """Sends signs of life until the server stops, as long as its committer and ticker work."""
        while not server.stopping:
            with contextlib.suppress(LingerError):  # of the database: a restart does not help
                if not server.broker.is_working(self.watchdog):
                    log("linger: the ticker is stuck: the watchdog is to restart this server")
                    return
            self.notify("WATCHDOG=1")
            server.await_stop(self.watchdog / 3)


def has_terminal() -> bool:
    """Whether this process was started at a terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _handle_hang_up(server: Server, manager: ServiceManager, has_files: bool) -> None:
    """Lets SIGHUP read the files again, or stop a server whose terminal was closed."""
    had_terminal = has_terminal()

    def hang_up(*_: object) -> None:
        if had_terminal and not has_terminal():
            server.shutdown()
        elif has_files:
            manager.reload(server)
        else:
            log("linger: SIGHUP: there are no files of tokens or TLS to read again")

    if has_files or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets
        signal.signal(signal.SIGHUP, hang_up)


def _start_line(server: Server, options: Mapping[str, Any]) -> str:
    """Returns what a server says when it begins."""
    if options["dbfile"] == MEMORY:
        kept = "messages kept in memory only"
    elif is_cluster(options["dbfile"]):
        kept = f"messages kept in {ClusterUrl.parse(options['dbfile'])}"  # without its password
    else:
        kept = f"messages kept in {os.path.abspath(options['dbfile'])} (sync {options['sync']})"
    everywhere = " (all addresses)" if server.server_name in ("0.0.0.0", "::") else ""
    return f"Linger {__version__} listening on {server.url}{everywhere}, {kept}"


def run_server(arguments: Sequence[str], commands: str) -> int:
    """Runs a server until SIGTERM or SIGINT; returns the exit status."""
    _tune_threads()
    tune_memory()
    tune_sqlite()
    os.umask(0o077)  # files of this process are for its owner only
    options = read_options(arguments, os.environ, commands)
    require_posix("a server of Linger")
    options["max_connections"] = _raise_file_limit(
        options["max_connections"] or default_max_connections()
    )
    try:
        server = _create_server(options)
    except OSError as error:
        address = options["host"]
        if not address.startswith(UNIX):
            address += f" port {options['port']}"
        raise Unavailable(f"cannot listen on {address}: {reason_of(error)}") from error

    def stop(number: int, _: object) -> None:
        if server.stopping:
            os._exit(128 + number)  # the second signal: at once
        server.shutdown()

    manager = ServiceManager(os.environ)
    _handle_hang_up(server, manager, options["tokens"] is not None or options["cert"] is not None)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.set_wakeup_fd(server.wake_fd)  # the system may deliver a signal to any thread
    write_line(_start_line(server, options), sys.stdout)
    with server:
        manager.notify("READY=1", f"STATUS=listening on {server.url}")
        if manager.watchdog:
            threading.Thread(target=manager.watch, args=(server,), daemon=True).start()
        server.serve_forever()
        manager.notify("STOPPING=1")
        signal.set_wakeup_fd(-1)
    return 0


# ---------------------------------------------------------------------------------------------
# Commands: what each command does with a client and its parsed options, and how it writes the
# result.  A command returns its exit status, or None for 0.  Knows no arguments: see Command line.
# ---------------------------------------------------------------------------------------------


# The columns of lists
COPY_COLUMNS = ("channel", "id")
TAIL_COLUMNS = ("event", "id", "delivered", "from", "body")
LISTEN_COLUMNS = ("body",)
MESSAGE_COLUMNS = ("id", "state", "priority", "delivered", "age", "error", "body")
CHANNEL_COLUMNS = (
    "channel", "ready", "delayed", "in-flight", "oldest", "waiting", "paused", "blocked"
)  # fmt: skip
SUBSCRIBER_COLUMNS = ("channel", "pattern")  # the second one where patterns match
PUBLICATION_COLUMNS = ("id", "type", "body")
PAIR_COLUMNS = ("name", "value")
SCHEDULE_COLUMNS_SHOWN = ("name", "channel", "times", "next", "last", "last-error")
RATE_COLUMNS = ("name", "now", "per second")
BENCH_COLUMNS = ("measurement", "per-second", "p50-ms", "p99-ms", "sync-percent")


def open_client(url: Optional[str], options: argparse.Namespace) -> Client:
    """Returns a client with the connection options of a command."""
    client = Client(url, options.token, cafile=options.cafile)
    if options.cafile and not client.url.startswith("https:"):
        raise BadRequest(f"--cafile is for https, and the server's URL is {client.url}")
    client._transport.warn = warn_user
    return client


# -- output: bytes and lines for pipes, tables for people


def _write(data: bytes) -> None:
    """Writes to standard output; the bytes have left this process when this returns."""
    rest, file = memoryview(data), sys.stdout.buffer
    try:
        while rest:
            written = file.write(rest)  # without a buffer (`python -u`) perhaps only a part,
            if written is None:  # or nothing, where the file would block
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            rest = rest[written:]
        file.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LingerError(f"cannot write to standard output: {reason_of(error)}") from error


def _write_body(body: bytes, end: bytes = b"") -> None:
    """Writes a body as it is; without an `end`, a terminal gets a newline after it."""
    _write(body + (end or b"\n" * sys.stdout.isatty()))


def _write_lines(lines: Iterable[str]) -> None:
    _write("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))


def _write_records(records: Sequence[Mapping[str, object]], as_json: bool = False) -> int:
    """Writes records as lines of JSON, as a table to a terminal, or as values between tabs.

    Returns the exit status: 1 if there are none.
    """
    if as_json:
        _write_lines(map(TO_JSON, records))
    elif records:
        rows = [[_format_value(value) for value in record.values()] for record in records]
        tabular = sys.stdout.isatty() and len(records[0]) > 1
        _write_lines(_format_table(list(records[0]), rows) if tabular else map("\t".join, rows))
    return 0 if records else 1


def _write_pairs(pairs: Mapping[str, object], as_json: bool) -> int:
    """Writes a record: one object of JSON, or a line for each name and value."""
    if as_json:
        return _write_records([pairs] if pairs else [], as_json)
    return _write_records([dict(zip(PAIR_COLUMNS, pair)) for pair in pairs.items()])


def _format_value(value: object) -> str:
    """Returns a value on one line; escapes control characters, which could command a terminal."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return TO_JSON(value)
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))


def _format_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table that fits the terminal, with numbers to the right."""
    columns = list(zip(*rows))
    numeric = [all(re.fullmatch(r"-|-?[0-9.]+", cell) for cell in column) for column in columns]
    widths = [max(map(_display_width, column)) for column in zip(heads, *rows)]
    _shrink_to_terminal(widths, [n for n, is_number in enumerate(numeric) if not is_number])
    lines = []
    for row in (heads, *rows):
        cells = map(_format_cell, row, widths, numeric)
        lines.append("  ".join(cells).rstrip())
    if "NO_COLOR" not in os.environ:  # no-color.org
        lines[0] = f"\x1b[1m{lines[0]}\x1b[0m"
    return lines


def _shrink_to_terminal(widths: list[int], shrinkable: Sequence[int]) -> None:
    """Takes the excess from the widest of the shrinkable columns, of several from the last.

    The lines of a table that is wider even then are wrapped by the terminal, not cut.
    """
    excess = sum(widths) + 2 * len(widths) - 2 - shutil.get_terminal_size().columns
    for _ in range(excess if shrinkable else 0):
        widest = max(shrinkable, key=lambda n: (widths[n], n))
        widths[widest] = max(widths[widest] - 1, MIN_COLUMN)


def _format_cell(text: str, width: int, is_number: bool) -> str:
    """Returns a text in so many columns of a terminal, shortened if it takes more."""
    missing = width - _display_width(text)
    if missing < 0:
        text = _shorten(text, width)
        missing = width - _display_width(text)
    return " " * missing + text if is_number else text + " " * missing


def _shorten(text: str, width: int) -> str:
    """Returns the start of a text, with an ellipsis for what is left out."""
    for end, character in enumerate(text):
        width -= _display_width(character)
        if width < 1:
            return f"{text[:end]}…"
    return text


def _display_width(text: str) -> int:
    """Returns how many columns of a terminal a text takes (Unicode Standard Annex 11)."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in ("W", "F") for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def _show_progress(text: str) -> None:
    """Replaces the progress line at a terminal; writes nothing to a pipe."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def warn_user(text: str) -> None:
    """Says why a command does not go on."""
    _show_progress("")
    log(f"linger: {text}")


# -- producing


def _given_parameters(options: argparse.Namespace, table: Sequence[Parameter]) -> dict[str, Any]:
    """Returns the parameters of a table that were given, by their names in Python."""
    values = ((name, getattr(options, name)) for name in (p.name.replace("-", "_") for p in table))
    given = {name: value for name, value in values if value is not None}
    if "headers" in given:
        pairs = [text.partition(":") for text in given["headers"]]
        if not all(colon for _, colon, _ in pairs):
            raise BadRequest("--header must be NAME:VALUE, as 'trace-id: 4bf92f35'")
        given["headers"] = {name: value.strip(" ") for name, _, value in pairs}
        if len(given["headers"]) < len(pairs):
            raise BadRequest("each --header must have a different name")
    return given


def _standard_input() -> BinaryIO:
    """Returns standard input, which waits for data: without, a read seems to be at the end."""
    with contextlib.suppress(OSError, AttributeError):  # a stream in memory; Windows
        os.set_blocking(sys.stdin.fileno(), True)  # another process may have set it otherwise
    return sys.stdin.buffer


def _read_body(options: argparse.Namespace) -> bytes:
    """Returns the body in the arguments, or else standard input."""
    if options.body in (None, "-"):
        return _standard_input().read(MAX_MESSAGE_OPTION + 1)
    return os.fsencode(options.body)


def _post(client: Client, options: argparse.Namespace) -> int:
    parameters = _given_parameters(options, ALL_PARAMETERS)
    if options.lines:
        return _post_lines(client, options, parameters)
    posted = client.post(
        options.channel, _read_body(options), options.type, retry=True, **parameters
    )
    return _write_records([posted._asdict() if options.json else {"id": posted.id}], options.json)


def _call(client: Client, options: argparse.Namespace) -> int:
    parameters = _given_parameters(options, CALL_PARAMETERS)
    body = _read_body(options)
    try:
        reply = client.call(options.channel, body, options.wait, options.type, **parameters)
    except LingerError as error:
        if error.status != OutcomeUnknown.status:
            raise
        log(f"linger: {error}")
        return 1
    _write_body(reply.body)
    return 0


def _post_lines(client: Client, options: argparse.Namespace, parameters: dict[str, Any]) -> int:
    """Posts each line of standard input.

    The dedup key of each line includes its number: a batch whose response was lost can be sent
    again, and so can the whole input with the same `--dedup`.
    """
    if options.body not in (None, "-"):
        raise BadRequest("--lines reads the messages from standard input: omit BODY")
    key = parameters.pop("dedup", None) or os.urandom(16).hex()
    posted, last = 0, 0
    batch: list[tuple[int, bytes]] = []
    try:
        for batch in _read_batches(_standard_input()):
            items = [(line, options.type, {"dedup": f"{key}#{n}"}) for n, line in batch]
            posted += len(client.post_batch(options.channel, items, retry=True, **parameters))
            last = batch[-1][0]
            _show_progress(f"{posted} posted")
        _show_progress("")
    except BaseException as error:
        _show_progress("")
        index = getattr(error, "index", None)
        place = "" if index is None else f"line {batch[index][0]}: "
        so_far = f"{posted} messages were posted for certain, up to line {last}"
        if isinstance(error, LingerError):
            raise LingerError(f"{place}{error}; {so_far}") from error
        log(f"linger: {so_far}")
        raise
    return _write_records([{"posted": posted}], options.json)


def _read_batches(file: Any) -> Iterator[list[tuple[int, bytes]]]:
    """Yields the lines of a file that are not empty, with their numbers, as they arrive.

    Each list fits into a batch.
    """
    number, rest = 0, b""
    while True:
        chunk = file.read1(MAX_LINES_BYTES)
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk:
            lines, rest = [rest], b""
        elif len(rest) > MAX_BATCH_BYTES:
            raise TooLarge(f"line {number + len(lines) + 1} has more than {MAX_BATCH_BYTES} bytes")
        numbered = [(n, line) for n, line in enumerate(lines, number + 1) if line]
        number += len(lines)
        for start in range(0, len(numbered), MAX_BATCH):
            yield numbered[start : start + MAX_BATCH]
        if not chunk:
            return


def _publish(client: Client, options: argparse.Namespace) -> None:
    keys = _given_parameters(options, PUBLISH_PARAMETERS)
    copies = client.publish(options.topic, _read_body(options), options.type, retry=True, **keys)
    records = [dict(zip(COPY_COLUMNS, copy)) for copy in copies.items()]
    _write_records(records, options.json)
    if not copies:
        _explain_no_copies(client, options.topic)


def _explain_no_copies(client: Client, topic: str) -> None:
    """Logs why a publication reached nobody, as far as the token lets us see."""
    subscribers: Collection[str] = ()
    with contextlib.suppress(LingerError):
        subscribers = client.subscribers(topic) or client.pattern_subscribers(topic)
    if subscribers:
        reason = f"the channels subscribed to {topic} are at their high-level mark"
    else:
        reason = f"no subscription to {topic} is visible (linger subscribe CHANNEL {topic})"
    log(f"linger: no channel got a copy: {reason}")


def _load(client: Client, options: argparse.Namespace) -> int:
    try:
        loaded = client.load(_read_records(_standard_input()))
    except LingerError as error:
        place = "" if error.index is None else f"line {error.index + 1}: "
        raise LingerError(f"{place}{error}; the lines before may be loaded") from error
    return _write_records([{"loaded": loaded}], options.json)


def _read_records(lines: Iterable[bytes]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise BadRequest(f"line {number} is not valid JSON") from None


# -- consuming


def _get(client: Client, options: argparse.Namespace) -> int:
    """Writes messages; with `--ack` each is deleted after it was written, not before."""
    wait = DEFAULT_WAIT if options.follow else options.wait or 0
    channels = options.channel.split(",")
    take = functools.partial(client.get, channels, wait, options.timeout, auto=options.auto)
    limit = options.count or (sys.maxsize if options.follow else 1)
    done: Optional[Message] = None
    count = 0
    try:
        while count < limit:
            message, done = _take_next(client, take, done, options.follow), None
            if message is not None:
                count += 1
                _write_message(client, message, options, b"\n" * (limit > 1))
                done = message if options.ack else None
            elif not options.follow:
                break
    finally:
        if done is not None:
            with contextlib.suppress(NotFound):  # the interrupted take has deleted it
                client.delete(done)
    return 0 if count else 1


def _take_next(
    client: Client, take: Callable[..., Optional[Message]], done: Optional[Message], follow: bool
) -> Optional[Message]:
    """Acknowledges `done` and takes the next message; with `follow`, across restarts."""
    request = functools.partial(take, ack=done)
    try:
        return client._transport.retry(request) if follow else request()
    except (NotFound, Conflict):
        if done is None:
            raise
    return _take_next(client, take, None, follow)  # `done` is deleted, or was delivered again


def _write_message(
    client: Client, message: Message, options: argparse.Namespace, end: bytes
) -> None:
    """Writes a message; releases one that would be acknowledged but cannot be written."""
    try:
        if options.json:
            _write_records([message_object(message)], as_json=True)
        else:
            _write_body(message.body, end)
    except BaseException:
        if options.ack:
            with contextlib.suppress(LingerError):
                client.release(message, 0)
        raise


def _tail(client: Client, options: argparse.Namespace) -> None:
    """Writes a line for each event, until it is interrupted."""
    channel, topic = getattr(options, "channel", None), getattr(options, "topic", None)
    pattern, since = None, getattr(options, "since", None)
    if topic is not None and options.pattern:
        topic, pattern = None, topic
    items = client._live_items(channel, topic, threading.Event(), pattern, since)
    for item, _ in itertools.islice(items, options.count):
        if options.json:
            _write_lines([TO_JSON(item)])
            continue
        body = parse_event(item).body.decode(errors="replace")
        names = TAIL_COLUMNS if channel else LISTEN_COLUMNS
        row = [{**item, "body": body}.get(name) for name in names]
        _write_lines(["\t".join(map(_format_value, row))])


# -- inspection


def _show(client: Client, options: argparse.Namespace) -> None:
    message, state = client.read_message(options.id)
    if options.json:
        _write_records([{**message_object(message), "state": state}], as_json=True)
    else:
        _write_body(message.body)


def _peek(client: Client, options: argparse.Namespace) -> int:
    listed = client.list_messages(options.channel, options.state, options.count, options.after)
    if options.json:
        records = [{**message_object(message), "state": state} for message, state in listed]
        return _write_records(records, as_json=True)
    shown = _last_line if sys.stdout.isatty() else str
    rows = (
        (m.id, state, m.priority, m.delivered, m.received, shown(m.error),
         m.body.decode(errors="replace"))
        for m, state in listed
    )  # fmt: skip
    return _write_records([dict(zip(MESSAGE_COLUMNS, row)) for row in rows])


def _last_line(error: str) -> str:
    """Returns the line of an error that says the most: in a traceback it is the last one."""
    return error.strip().rpartition("\n")[2].strip()


def _dump(client: Client, options: argparse.Namespace) -> int:
    status = 1
    for record in client.dump(list(dict.fromkeys(options.channels)) or None):
        status = _write_records([record], as_json=True)
    return status


def _channels(client: Client, options: argparse.Namespace) -> int:
    infos = client.channel_infos()
    if not options.json:
        infos = [{name: info[name] for name in CHANNEL_COLUMNS} for info in infos]
    return _write_records(infos, options.json)


def _topics(client: Client, options: argparse.Namespace) -> int:
    topics = client.topics(options.channel)
    return _write_records([{"topic": topic} for topic in topics], options.json)


def _patterns(client: Client, options: argparse.Namespace) -> int:
    patterns = client.patterns(options.channel)
    return _write_records([{"pattern": pattern} for pattern in patterns], options.json)


def _subscribers(client: Client, options: argparse.Namespace) -> int:
    rows = [(channel, "") for channel in client.subscribers(options.topic)]
    patterns = client.pattern_subscribers(options.topic).items()
    rows += [(channel, pattern) for pattern, channels in patterns for channel in channels]
    shown = SUBSCRIBER_COLUMNS if patterns else SUBSCRIBER_COLUMNS[:1]
    return _write_records([dict(zip(shown, row)) for row in rows], options.json)


def _stats(client: Client, options: argparse.Namespace) -> int:
    if not options.watch:
        return _write_pairs(client.stats(), options.json)
    names = (*COUNTERS, "current-messages-ready", "current-messages-hidden")
    before, then = client.stats(), time.monotonic()
    while True:
        time.sleep(options.watch)
        stats, now = client.stats(), time.monotonic()
        rates = {name: round((stats[name] - before[name]) / (now - then), 1) for name in names}
        if sys.stdout.isatty():
            _write(b"\x1b[H\x1b[J")  # clear the screen
        records = [dict(zip(RATE_COLUMNS, (name, stats[name], rates[name]))) for name in names]
        _write_records(records, options.json)
        before, then = stats, now


# -- changing messages and channels


def _delete(client: Client, options: argparse.Namespace) -> int:
    """Deletes messages; of several, those that are missing stop nothing."""
    ids = list(dict.fromkeys(options.ids))
    if len(ids) == 1:
        client.delete(ids[0], options.lease)
        return 0
    if options.lease is not None:
        raise BadRequest("--lease is the number of one delivery: delete one ID with it")
    missing = []
    for start in range(0, len(ids), MAX_BATCH):
        missing += client.delete_batch(ids[start : start + MAX_BATCH])[2]
    for id in missing:
        log(f"linger: there is no message {id}")
    return 1 if missing else 0


def _drain(client: Client, options: argparse.Namespace) -> int:
    if not options.yes:
        if not sys.stdin.isatty():
            raise BadRequest("drain deletes all messages of a channel: pass --yes to confirm")
        count = sum(client.channel_stats(options.channel).values())
        _show_progress(f"Delete all {count} messages of {options.channel}? [y/N] ")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return 1
    client.drain(options.channel)
    return 0


def _redrive(client: Client, options: argparse.Namespace) -> int:
    is_one = options.id is not None
    if is_one != (options.channel is None) or (is_one and options.count is not None):
        raise BadRequest("redrive needs a CHANNEL, perhaps with --count, or --id: one of them")
    if is_one:
        client.redrive_message(options.id, options.to)
        moved = 1
    else:
        moved = client.redrive(options.channel, options.count, options.to)
    _write_records([{"moved": moved}], options.json)
    return 0 if moved else 1


def _subscribe(client: Client, options: argparse.Namespace) -> None:
    given = _given_parameters(options, MESSAGE_PARAMETERS)
    if options.pattern:
        client.subscribe_pattern(options.channel, options.topic, **given)
    else:
        client.subscribe(options.channel, options.topic, options.since, **given)


def _retention(client: Client, options: argparse.Namespace) -> int:
    if options.clear:
        client.clear_topic_settings(options.topic)
    elif options.keep or options.keep_for:
        client.set_topic_settings(options.topic, options.keep, options.keep_for)
    else:
        return _write_pairs(client.topic_settings(options.topic), options.json)
    return 0


def _publications(client: Client, options: argparse.Namespace) -> int:
    kept = client.publications(options.topic, options.since or "all", options.count)
    if options.json:
        return _write_records(kept, as_json=True)
    rows = ((p.id, p.type, p.body.decode(errors="replace")) for p in map(parse_event, kept))
    return _write_records([dict(zip(PUBLICATION_COLUMNS, row)) for row in rows])


def _copy(options: argparse.Namespace) -> int:
    return _write_records([{"copied": copy_database(options.source, options.target)}])


def _settings(client: Client, options: argparse.Namespace) -> int:
    parameters = _given_parameters(options, CHANNEL_PARAMETERS)
    if options.clear:
        client.clear_settings(options.channel)
    elif parameters and options.keep:
        client.change_settings(options.channel, **parameters)
    elif parameters:
        client.set_settings(options.channel, **parameters)
    else:
        return _write_pairs(client.settings(options.channel), options.json)
    return 0


# -- schedules


def _schedule(client: Client, options: argparse.Namespace) -> int:
    if options.delete:
        client.unschedule(options.name)
    elif options.run:
        _write_records([{"id": client.run_schedule(options.name).id}], options.json)
    elif options.channel is None:
        return _write_pairs(client.read_schedule(options.name), options.json)
    else:
        client.schedule(
            options.name, options.channel, _read_body(options), options.type, cron=options.cron,
            tz=options.tz, every=options.every, catch_up=not options.no_catch_up,
            **_given_parameters(options, SCHEDULE_PARAMETERS),
        )  # fmt: skip
    return 0


def _schedules(client: Client, options: argparse.Namespace) -> int:
    schedules = client.schedules()
    if options.json:
        return _write_records(schedules, as_json=True)
    for schedule in schedules:
        every = f"every {schedule.get('every')}"
        schedule["times"] = f"{schedule['cron']} {schedule['tz']}" if "cron" in schedule else every
    return _write_records([{n: s[n] for n in SCHEDULE_COLUMNS_SHOWN} for s in schedules])


# ---------------------------------------------------------------------------------------------
# Worker: `linger work`, which runs a command as a process for each message.  Knows processes and
# signals, but no requests: the client's consumer loop takes and settles the messages.
# ---------------------------------------------------------------------------------------------

STOPPED = "the worker was stopped"
DELIVERED_FIELDS = Message._fields[1 : Message._fields.index("dead")]  # without those of listings
ENVIRONMENT_FIELDS = (
    *(name for name in DELIVERED_FIELDS if name not in ("body", "header_lines")), "reply_to",
)  # fmt: skip
TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h, which `os` has on POSIX systems only
NO_SUCH_COMMAND = frozenset((  # errors of exec that say that it can never run
    errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOEXEC,
    errno.ENOTDIR, errno.EPERM,
))  # fmt: skip


class CannotStart(LingerError):
    """A command cannot be started now, for want of memory, space, processes or files."""


class Job:
    """A process that runs a command for a message, whose body is its standard input.

    It leads a session, and so a process group, of its own: Ctrl-C at a terminal reaches only the
    worker, and the job can be killed with all its children.  Its standard error is passed on, and
    the end of it kept.  A worker thread starts it and waits; any thread may call `kill`.
    """

    def __init__(
        self,
        command: Sequence[str],
        body: bytes,
        environment: Mapping[bytes, bytes],
        time_limit: Optional[int],
        output: Optional[BinaryIO],
    ) -> None:
        """Starts the process, which is killed after `time_limit` seconds.

        `output`: where its standard output goes, in place of the worker's.

        Everything that it needs is there before it starts.  Raises `CannotStart`, or
        `LingerError` if there is no such command.
        """
        self.killed = ""  # the reason if it was killed
        self.status = 0  # exit status after its end, negative for a signal
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._ended = False
        self._stderr_tail = b""
        self._timers: list[threading.Timer] = []
        try:
            with _input_file(body) as file:
                self._stderr_copier, writer = self._copy_from_pipe()
                with open(writer, "wb") as stderr:
                    if time_limit is not None:
                        reason = f"it took longer than {time_limit} seconds"
                        self._after(time_limit, self.kill, reason)
                    self._start(command, file, output, stderr, environment)
        except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no more threads
            self._end()
            reason = reason_of(error) or "no memory"
            raise CannotStart(f"cannot run {command[0]}: {reason}") from error
        except LingerError:
            self._end()
            raise
        if self.killed:
            self._signal(signal.SIGTERM)

    def _start(
        self,
        command: Sequence[str],
        file: BinaryIO,
        output: Optional[BinaryIO],
        stderr: BinaryIO,
        environment: Mapping[bytes, bytes],
    ) -> None:
        try:
            self._process = subprocess.Popen(
                command, stdin=file, stdout=output, stderr=stderr, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            if error.errno in NO_SUCH_COMMAND:
                raise LingerError(f"cannot run {command[0]}: {error.strerror}") from error
            raise

    def wait(self) -> None:
        """Waits for its end."""
        assert self._process is not None  # since it has started
        self.status = self._process.wait()
        if self.killed:
            self._signal(signal.SIGKILL)  # remaining children
        self._end()
        self._stderr_copier.join(STDERR_TIMEOUT)

    def kill(self, reason: str) -> None:
        """Sends SIGTERM to its process group, and after a while SIGKILL."""
        if not self.killed and not self._ended:
            self.killed = reason
            self._signal(signal.SIGTERM)
            try:
                self._after(KILL_GRACE, self._signal, signal.SIGKILL)
            except RuntimeError:  # no more threads
                self._signal(signal.SIGKILL)

    def failure(self) -> str:
        """Returns why it failed; empty if it succeeded."""
        if self.killed or not self.status:
            return self.killed
        return f"exit status {self.status}" if self.status > 0 else f"signal {-self.status}"

    def reason(self) -> str:
        """Returns why it failed, with the end of its standard error."""
        tail = self._stderr_tail.decode("utf-8", "replace").strip().encode()[-STDERR_TAIL:]
        return f"{self.failure()}: {tail.decode('utf-8', 'ignore')}" if tail else self.failure()

    def _after(self, seconds: float, function: Callable[[Any], None], argument: object) -> None:
        timer = threading.Timer(seconds, function, (argument,))
        timer.name, timer.daemon = "linger-timer", True
        self._timers.append(timer)
        timer.start()

    def _end(self) -> None:
        self._ended = True
        for timer in self._timers:
            timer.cancel()

    def _signal(self, number: int) -> None:
        if self._process is not None and not self._ended:  # or the id may be another process's
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a zombie
                os.killpg(self._process.pid, number)

    def _copy_from_pipe(self) -> tuple[threading.Thread, int]:
        """Returns a thread that copies standard error, and the end of the pipe to write it to."""
        reader, writer = os.pipe()
        copier = threading.Thread(
            target=self._copy_stderr, args=(reader,), name="linger-stderr", daemon=True
        )
        try:
            copier.start()
        except BaseException:
            os.close(reader)
            os.close(writer)
            raise
        return copier, writer

    def _copy_stderr(self, reader: int) -> None:
        with open(reader, "rb") as stderr:
            while data := stderr.read1(STDERR_TAIL):
                self._stderr_tail = (self._stderr_tail + data)[-STDERR_TAIL:]
                with contextlib.suppress(OSError, ValueError):
                    if sys.stderr is not None:
                        sys.stderr.buffer.write(data)
                        sys.stderr.buffer.flush()


def _input_file(body: bytes) -> BinaryIO:
    """Returns a file with these bytes for standard input; a pipe would block until it is read.

    It is in memory where the system has such files, so that a full disk stops no command.
    """
    try:
        file: Any = open(os.memfd_create("linger"), "w+b")  # noqa: SIM115
    except (AttributeError, OSError):  # not on macOS; sandboxes forbid it
        file = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        file.write(body)
        file.seek(0)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    return cast(BinaryIO, file)


def _work_below_init() -> Optional[int]:
    """Forks, as process 1 of a container; returns None in the child, which is to do the work.

    Process 1 becomes the parent of every process whose own parent has ended, and must reap it.
    The child never sees those, so it cannot take their status for that of a command.  This
    process passes signals on, reaps, and returns the exit status of the child after its end.
    """
    numbers = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # or a terminal's Ctrl-C would reach it twice
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        return None
    while True:
        number = signal.sigwait(numbers)
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        ended, status = os.waitpid(-1, os.WNOHANG)
        while ended:
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            ended, status = os.waitpid(-1, os.WNOHANG)


class Worker:
    """Runs a command for each message of some channels, several at a time, until it is stopped.

    Each of its threads takes a message, runs the command, and settles the message; the next take
    deletes the message of a command that succeeded.  The main thread waits for signals and for
    the threads' end.
    """

    def __init__(self, client: Client, options: argparse.Namespace) -> None:
        require_posix("linger work")
        self._client = client
        client.name = client.name or f"{socket.gethostname()}:{os.getpid()}"
        self._options = options
        self._environment = {**os.environb, b"LINGER_URL": client.url.encode()}
        self._stop = threading.Event()
        self._remaining = threading.Semaphore(options.count or sys.maxsize)
        self._outage = Outage(warn_user, SERVER_IS_BACK)
        self._shortage = Outage(warn_user, "commands can be started again")
        # A byte for each event: the number of a signal, or 0 for a thread's end.
        self._event_reader, self._event_writer = os.pipe()
        self._lock = threading.Lock()  # guards the four attributes below
        self._jobs: set[Job] = set()
        self._stop_requests = 0  # SIGTERM and SIGINT so far; the second one kills
        self._worked = False
        self._error: Optional[LingerError] = None

    def run(self) -> int:
        """Works; returns the exit status, or raises the error that stopped it."""
        options = self._options
        if shutil.which(options.command[0]) is None:
            raise BadRequest(f"there is no executable command {options.command[0]}")
        if os.getpid() == 1 and threading.active_count() == 1:
            status = _work_below_init()
            if status is not None:
                return status
        self._client.server_info()  # a later outage is waited for, but not one at the start
        with self._signals_as_events():
            running = self._start_threads(min(options.j, options.count or options.j))
            while running:
                number = ord(os.read(self._event_reader, 1))
                if number:
                    self._stop_or_kill(number)
                else:
                    running -= 1
        if self._error is not None:
            raise self._error
        return 1 if options.once and not self._worked else 0

    def _start_threads(self, count: int) -> int:
        """Starts this number of threads; returns how many the system allows."""
        for n in range(count):
            try:
                threading.Thread(target=self._work, name=f"linger-worker-{n}").start()
            except RuntimeError as error:
                self._fail(LingerError(f"cannot run {count} commands at a time: {error}"))
                return n
        return count

    @contextlib.contextmanager
    def _signals_as_events(self) -> Iterator[None]:
        """Writes each signal to the pipe at once, whichever thread the system delivers it to."""
        os.set_blocking(self._event_writer, False)
        former = signal.set_wakeup_fd(self._event_writer)
        for number in stop_signals():
            signal.signal(number, lambda *_: None)
        try:
            yield
        finally:
            signal.set_wakeup_fd(former)
            os.close(self._event_reader)
            os.close(self._event_writer)

    def _stop_or_kill(self, number: int) -> None:
        """Takes no more messages; on the second SIGTERM or SIGINT, kills the commands.

        A SIGHUP never kills: the shell and the system may send one each, also beside SIGTERM.
        """
        self._stop.set()
        if number not in (signal.SIGTERM, signal.SIGINT):
            return
        with self._lock:
            self._stop_requests += 1
            to_kill = list(self._jobs) if self._stop_requests > 1 else []
        for job in to_kill:
            job.kill(STOPPED)

    def _work(self) -> None:
        """Works in one thread; after a message whose command cannot be started, it pauses."""
        options = self._options
        channels, wait = options.channel.split(","), 0 if options.once else None
        pauses = _retry_delays()
        with contextlib.ExitStack() as ending:
            ending.callback(os.write, self._event_writer, b"\0")
            try:
                loop = _ConsumerLoop(self._client, channels, wait, None, self._stop, self._outage)
                ending.callback(loop.close)
                ending.callback(loop.ack_current)
                run_job = functools.partial(self._run_job, loop)
                while self._remaining.acquire(blocking=False):
                    message = loop.next()
                    if message is None:
                        break
                    if loop.process(run_job, message, options.retry_delay):
                        pauses = _retry_delays()
                    else:
                        self._remaining.release()
                        self._stop.wait(next(pauses))
            except LingerError as error:
                self._fail(error)
            except RuntimeError as error:  # the system allows no more threads
                self._fail(LingerError(f"cannot run {options.j} commands at a time: {error}"))

    def _fail(self, error: LingerError) -> None:
        with self._lock:
            self._error = error
        self._stop.set()

    def _run_job(self, loop: _ConsumerLoop, message: Message) -> bool:
        """Runs the command for a message; with --reply its output is the reply to a call."""
        if not (self._options.reply and message.reply_to):
            return self._run_command(loop, message)
        with _input_file(b"") as output:
            has_run = self._run_command(loop, message, output)
            output.seek(0)
            loop.reply(output.read(MAX_MESSAGE_OPTION + 1))  # if it has not failed
        return has_run

    def _run_command(
        self, loop: _ConsumerLoop, message: Message, output: Optional[BinaryIO] = None
    ) -> bool:
        """Runs the command for a message; returns whether it could be started.

        Releases or rejects the message if that fails.  One whose command cannot be started is
        released as if it had not been delivered.
        """
        options, started = self._options, time.monotonic()
        with self._lock:
            self._worked = True
        environment = {**self._environment, **_environment_of(message)}
        try:
            job = Job(options.command, message.body, environment, options.time_limit, output)
        except CannotStart as error:
            self._shortage.begin(error)
            loop.release(str(error), 0, uncounted=True)
            return False
        except LingerError as error:
            self._fail(error)
            loop.release(str(error), options.retry_delay, uncounted=True)
            return False
        self._shortage.end()
        self._wait_for(job, loop, message)
        self._log_end(job, message, time.monotonic() - started)
        if not job.failure():
            return True
        if options.reject_on_failure and not job.killed and job.status != TEMPORARY_FAILURE:
            loop.reject(job.reason())
        elif job.killed == STOPPED:
            loop.release(job.reason(), 0)
        else:
            loop.release(job.reason(), None if message.backoff else options.retry_delay)
        return True

    def _wait_for(self, job: Job, loop: _ConsumerLoop, message: Message) -> None:
        def kill_if_lost(lost: Message) -> None:
            if lost is message:
                job.kill(LEASE_LOST)

        loop.on_lease_lost = kill_if_lost
        with self._lock:
            self._jobs.add(job)
            killing = self._stop_requests > 1
        if killing:
            job.kill(STOPPED)
        job.wait()
        with self._lock:
            self._jobs.discard(job)

    def _log_end(self, job: Job, message: Message, seconds: float) -> None:
        """Logs the failure of a command; with --verbose the end of each."""
        outcome = job.failure() or "done"
        if self._options.verbose:
            outcome += f" ({seconds:.1f} s, delivery {message.delivered})"
        if job.failure() or self._options.verbose:
            log(f"linger: {message_name(message)}: {outcome}")


def _environment_of(message: Message) -> dict[bytes, bytes]:
    """Returns all of a delivered message but its body, as environment variables."""
    fields = {name: getattr(message, name) for name in ENVIRONMENT_FIELDS}
    own = {"h_" + re.sub(r"\W", "_", name): value for name, value in message.headers.items()}
    values = {"message_id": message.id, **fields, **own}
    return {
        f"LINGER_{name.upper()}".encode(): str(value).replace("\0", "").encode()
        for name, value in values.items()
    }


# ---------------------------------------------------------------------------------------------
# Bench: `linger bench`, which measures a server through its HTTP API, with many connections at a
# time.  It competes with the server for the CPU, so it encodes each request once and parses only
# what it needs of a response.  Knows nothing of the server's inside.
# ---------------------------------------------------------------------------------------------

CONTENT_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: *([0-9]+)")
MESSAGE_ID = re.compile(rb"\r\n[Xx]-[Ll]inger-[Mm]sg-[Ii]d: *([0-9]+)")
MESSAGE_IDS = re.compile(rb'"id":([0-9]+)')
BATCH_TASK = f"batch of {BENCH_BATCH}"
# For how many syncs of the disk, at least, each measurement waits with --sync full.
SYNCS = {"disk sync": 1, "post": 1, "get": 0, "delete": 1, "job": 2, "ack-and-next": 2,
         BATCH_TASK: 2, "wake-up": 1}  # fmt: skip
# A task yields requests and receives their responses; it returns the number of messages, 0 if
# there are no more.
Task = Generator[bytes, bytes, int]


class _BenchConnection:
    """A connection under load; it reads whole responses, but not their meaning."""

    def __init__(self, transport: Transport) -> None:
        self._connection = transport.new_connection()
        self.socket = self._connection.open()
        self.send = self.socket.sendall

    def receive(self) -> bytes:
        """Returns a response, head and body, or raises the error that it reports."""
        response = self._receive_some()
        while (end := response.find(b"\r\n\r\n")) < 0:
            response += self._receive_some()
        status = int(response[9:12])
        found = CONTENT_LENGTH.search(response, 0, end)
        end += 4 + int(found[1] if found else 0)
        while len(response) < end:
            response += self._receive_some()
        if status >= 300:
            body = response.partition(b"\r\n\r\n")[2]
            raise error_in_response(self._connection.url, status, body)
        return response

    def close(self) -> None:
        """Closes the connection after the server has responded to all requests."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(65_536):
                pass
        self._connection.close()

    def _receive_some(self) -> bytes:
        data = self.socket.recv(65_536)
        if not data:
            raise ConnectionError("the server has closed it")
        return data


class Benchmark:
    """Measures the requests of many clients.

    One thread drives all connections, each with a task at a time: that costs less CPU than a
    thread each.  All messages are in a channel of the benchmark, which is drained at the end.
    """

    def __init__(self, client: Client, connections: int, seconds: float, size: int) -> None:
        """Opens the connections; `LingerError` if the server or the token does not allow it."""
        self._client = client
        self._connection_count = connections
        self._seconds = seconds
        self._channel = f"linger-bench-{os.urandom(16).hex()}"
        self._leased: list[bytes] = []  # ids of messages in flight
        path, body = f"/channels/{self._channel}", b"x" * size
        timeout = {"timeout": BENCH_TIMEOUT}
        encode = self._encode = client._transport.encode
        self._post = encode("POST", path, timeout, body, DEFAULT_TYPE)
        batch = encode_batch([body] * BENCH_BATCH, ALL_PARAMETERS)
        self._post_batch = encode("POST", f"{path}/batch", timeout, *batch)
        self._get = encode("GET", path, {"wait": 0})
        self._get_batch = encode("GET", path, {"wait": 0, "n": BENCH_BATCH})
        self._get_waiting = encode("GET", path, {"wait": int(CLIENT_TIMEOUT)})
        self._ack_and_get = encode("GET", path, {"wait": 0, "ack": "_ID_"}).split(b"_ID_", 1)
        self._delete = encode("DELETE", "/messages/_ID_").split(b"_ID_", 1)
        client.drain(self._channel)  # fails here, before messages are added, if not permitted
        self._connections = [
            _BenchConnection(client._transport) for _ in range(max(connections, 2))
        ]

    def close(self) -> None:
        """Closes the connections and deletes the messages."""
        for connection in self._connections:
            connection.close()
        self._client.drain(self._channel)

    def measurements(self) -> Iterator[dict[str, Any]]:
        """Makes the measurements one after the other; yields a record of each."""
        tasks = {
            "post": self._post_one,
            "get": self._get_one,
            "delete": self._delete_one,
            "job": self._job,
            "ack-and-next": self._job_and_next,
            BATCH_TASK: self._batch,
        }
        try:
            for name, task in tasks.items():
                _show_progress(f"{name} ...")
                yield _measurement(name, *self._measure(task))
            _show_progress("wake-up ...")
            times = self._wake_ups()
            yield {**_measurement("wake-up", len(times), sum(times), times), "per-second": None}
        except OSError as error:
            raise Unavailable(f"the connection to {self._client.url} broke: {error}") from error
        finally:
            _show_progress("")

    def _measure(self, new_task: Callable[[], Task]) -> tuple[int, float, list[float]]:
        """Runs tasks on all connections; returns the messages, the seconds, and those per task."""
        clock, count, times = time.perf_counter, 0, list[float]()
        running: dict[int, tuple[_BenchConnection, Task, float]] = {}
        poller = select.poll()
        start = now = clock()
        deadline = start + self._seconds

        def begin(connection: _BenchConnection) -> None:
            task = new_task()
            request = next(task, None) if now < deadline else None
            if request is None:
                poller.unregister(connection.socket)
                running.pop(connection.socket.fileno(), None)
            else:
                running[connection.socket.fileno()] = connection, task, now
                connection.send(request)

        for connection in self._connections[: self._connection_count]:
            poller.register(connection.socket, select.POLLIN)
            begin(connection)
        while running:
            for descriptor, _ in poller.poll(CLIENT_TIMEOUT * 1_000) or _fail_late():
                connection, task, began = running[descriptor]
                try:
                    connection.send(task.send(connection.receive()))
                except StopIteration as end:
                    now = clock()
                    if end.value:
                        count += end.value
                        times.append(now - began)
                    else:
                        deadline = now
                    begin(connection)
        return count, now - start, times

    def _post_one(self) -> Task:
        yield self._post
        return 1

    def _get_one(self) -> Task:
        found = MESSAGE_ID.search((yield self._get))
        if not found:
            return 0
        self._leased.append(found[1])
        return 1

    def _delete_one(self) -> Task:
        if not self._leased:
            return 0
        yield self._leased.pop().join(self._delete)
        return 1

    def _job(self) -> Task:
        yield self._post
        yield _id_in((yield self._get)).join(self._delete)
        return 1

    def _job_and_next(self) -> Task:
        yield self._post
        request = self._leased.pop().join(self._ack_and_get) if self._leased else self._get
        self._leased.append(_id_in((yield request)))
        return 1

    def _batch(self) -> Task:
        yield self._post_batch
        ids = MESSAGE_IDS.findall((yield self._get_batch))
        body = b"[" + b",".join(ids) + b"]"
        yield self._encode("POST", "/messages/delete", None, body, JSON_TYPE)
        return len(ids)

    def _wake_ups(self) -> list[float]:
        """Returns the seconds from each POST to the response of the consumer that waited."""
        consumer, producer = self._connections[:2]
        clock, times = time.perf_counter, list[float]()
        self._client.drain(self._channel)
        deadline = clock() + self._seconds
        while not times or clock() < deadline:
            consumer.send(self._get_waiting)
            while not self._client.info(self._channel)["waiting"]:
                if clock() > deadline + CLIENT_TIMEOUT:
                    _fail_late()
            start = clock()
            producer.send(self._post)
            response = consumer.receive()
            times.append(clock() - start)
            producer.receive()
            producer.send(_id_in(response).join(self._delete))
            producer.receive()
        return times


def _fail_late() -> NoReturn:
    raise TimeoutError(f"there was no response in {CLIENT_TIMEOUT:.0f} seconds")


def _id_in(response: bytes) -> bytes:
    """Returns the id of the message in a response."""
    found = MESSAGE_ID.search(response)
    if not found:
        raise Unavailable("a message is missing: another client takes or deletes those posted here")
    return found[1]


def _measurement(name: str, count: int, seconds: float, times: list[float]) -> dict[str, Any]:
    """Returns the record of a measurement."""
    times.sort()
    p50, p99 = (round(times[len(times) * share // 100] * 1_000, 3) for share in (50, 99))
    record = {"measurement": name, "count": count, "seconds": round(seconds, 3)}
    return {**record, "per-second": round(count / seconds), "p50-ms": p50, "p99-ms": p99}


def _measure_disk(directory: str, seconds: float) -> dict[str, Any]:
    """Measures the disk: writes of one page, each synced before the next."""
    clock, times = time.perf_counter, list[float]()
    sync = getattr(os, "fdatasync", os.fsync)
    with tempfile.TemporaryFile(dir=directory) as file:
        start = now = clock()
        while not times or now < start + seconds:
            os.pwrite(file.fileno(), bytes(4_096), 0)
            sync(file.fileno())
            times.append(clock() - now)
            now += times[-1]
    return _measurement("disk sync", len(times), now - start, times)


def _add_sync_percent(measured: Sequence[dict[str, Any]], sync: Optional[str]) -> None:
    """Adds to each measurement how much of its time the disk's syncs take; None if not known."""
    disk = measured[0]["p50-ms"] if sync == SYNC_LEVELS[0] else None
    for record in measured:
        syncs, milliseconds = SYNCS[record["measurement"]], max(record["p50-ms"], 0.001)
        share = None if disk is None else min(syncs * disk / milliseconds, 1.0)
        record["sync-percent"] = None if share is None else round(100 * share)


@contextlib.contextmanager
def _temporary_server(directory: str, sync: str) -> Iterator[str]:
    """Runs a server with an empty database in a process of its own; yields its URL."""
    arguments = ("--port", "0", "--dbfile", os.path.join(directory, "linger.db"), "--sync", sync)
    environment = {n: value for n, value in os.environ.items() if not n.startswith("LINGER_")}
    with open(os.path.join(directory, "log"), "w+") as file, subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), *arguments],
        stdout=subprocess.PIPE, stderr=file, env=environment, text=True,
        start_new_session=True,  # Ctrl-C reaches only this process, which still needs the server
    ) as process:  # fmt: skip
        try:
            line = process.stdout.readline() if process.stdout else ""
            found = re.search(r"listening on ([^\s,]+)", line)
            if not found:
                file.seek(0)
                reason = file.read().strip().rpartition("\n")[2]
                raise Unavailable(f"the server does not start: {reason.replace('linger: ', '')}")
            yield found[1]
        finally:
            process.kill()


def _bench(options: argparse.Namespace) -> int:
    """Measures the server at a URL, or a temporary one.

    LINGER_URL is ignored: a server in production is measured only when it is named.
    """
    require_posix("linger bench")
    url = options.server or options.url
    if url:
        return _run_benchmark(url, None, [], options)
    if options.token or options.cafile:
        raise BadRequest("--token and --cafile are for a running server: pass its URL")
    sync = options.sync or SYNC_LEVELS[0]
    parent = options.folder or "."
    with tempfile.TemporaryDirectory(prefix="linger-bench-", dir=parent) as directory:
        _show_progress("disk sync ...")
        disk = _measure_disk(directory, min(options.seconds, DISK_TEST_SECONDS))
        with _temporary_server(directory, sync) as url:
            return _run_benchmark(url, sync, [disk], options)


def _run_benchmark(
    url: str, sync: Optional[str], measured: list[dict[str, Any]], options: argparse.Namespace
) -> int:
    with open_client(url, options) as client:
        version = client.server_info()["version"]
        benchmark = Benchmark(client, options.connections, options.seconds, options.bytes)
        with contextlib.closing(benchmark):
            measured.extend(benchmark.measurements())
    _add_sync_percent(measured, sync)
    if options.json:
        record = {"url": url, "version": version, "sync": sync, "time": int(time.time()),
                  "connections": options.connections, "bytes": options.bytes,
                  "python": sys.version.split()[0], "sqlite": sqlite3.sqlite_version,
                  "processors": os.cpu_count(), "measurements": measured}  # fmt: skip
        return _write_records([record], as_json=True)
    return _write_records([{name: record[name] for name in BENCH_COLUMNS} for record in measured])


# ---------------------------------------------------------------------------------------------
# Command line: the table of commands, and `main`, which parses the arguments and runs one of them.
# Knows the arguments and help texts of a command, but not what it does with a server.
# ---------------------------------------------------------------------------------------------

_Argument = tuple[tuple[str, ...], dict[str, Any]]


def _argument(*flags: str, help: str, **settings: Any) -> _Argument:
    """Returns an argument or option for argparse; its help shows the default."""
    if settings.get("default") not in (None, ""):
        help += f" (default: {settings['default']})"
    return flags, {"help": help, **settings}


def _flag(name: str, help: str) -> _Argument:
    return _argument(name, action="store_true", help=help)


def _number(
    flag: str, value: str, help: str, minimum: int = 1, maximum: int = MAX_INTEGER, **settings: Any
) -> _Argument:
    name = flag if flag[0] == "-" else value

    def parse(text: str) -> int:
        return parse_integer(name, text, minimum, maximum)

    return _argument(flag, metavar=value, type=parse, help=help, **settings)


def _seconds(
    flag: str, help: str, minimum: int = 1, maximum: int = MAX_INTEGER, **settings: Any
) -> _Argument:
    return _number(flag, "SECONDS", help, minimum, maximum, **settings)


def _parameters(table: Sequence[Parameter]) -> tuple[_Argument, ...]:
    """Returns the options for the parameters of a table; each of its headers has its own."""
    return tuple(
        HEADER if p.name == "headers" else _argument(f"--{p.name}", metavar="VALUE", help=p.help)
        for p in table
    )


def _bench_seconds(text: str) -> float:
    minimum, maximum = BENCH_SECONDS
    with contextlib.suppress(ValueError):
        if minimum <= float(text) <= maximum:
            return float(text)
    raise BadRequest(f"--seconds must be from {minimum} to {maximum}")


HEADER = _argument(
    "--header", metavar="NAME:VALUE", dest="headers", action="append",
    help="header of its own; may be repeated",
)  # fmt: skip
CHANNEL = _argument("channel", metavar="CHANNEL", help="name of the channel")
CHANNELS_IN_ORDER = _argument(
    "channel", metavar="CHANNEL[,...]", help="channels; the first one that has a message is used"
)
TOPIC = _argument("topic", metavar="TOPIC", help="name of the topic")
SINCE = _argument(
    "--since", metavar="SINCE", help="what is kept after this id, of this age as 5m, or all"
)
PATTERN = _flag("--pattern", "TOPIC is a pattern: words with dots between, * for one, # for any")
BODY = _argument(
    "body", metavar="BODY", nargs="?", help="the content; `-` or omitted: standard input"
)
TYPE = _argument("--type", default=DEFAULT_TYPE, help="Content-Type of the body")
ID = _number("id", "ID", "id of the message", 0)
IDS_TO_DELETE = _number("ids", "ID", "ids of the messages", 0, nargs="+")
LEASE = _number("--lease", "N", "fail unless this is the latest delivery", 0)
REASON = _argument("--reason", metavar="TEXT", default="", help="text for the next consumer")
TIMEOUT = _seconds("--timeout", "visibility timeout, in place of the message's own")
JSON = _flag("--json", "write JSON, one object per line")
NO_MESSAGE = "there is no such message"
DEDUP_FOR_ALONE = ("--dedup-for", "--dedup", "without a key there is nothing to remember")
CONNECTION = (
    _argument("--url", help=f"URL of the server (default: LINGER_URL, or {DEFAULT_URL})"),
    _argument("--token", help="token; prefer LINGER_TOKEN, because other users see arguments"),
    _argument("--cafile", metavar="FILE", help="certificates to trust instead of the system's"),
)


WORK_VARIABLES = ",\n  ".join(
    ", ".join(f"LINGER_{name.upper()}" for name in ENVIRONMENT_FIELDS[start : start + 5])
    for start in range(0, len(ENVIRONMENT_FIELDS), 5)
)
WORK_NOTES = f"""\
environment of COMMAND, in addition to that of the worker:
  LINGER_URL of the server, LINGER_MESSAGE_ID, LINGER_H_NAME for each header of its own,
  {WORK_VARIABLES}
exit status of COMMAND:
  0  the message is deleted
  {TEMPORARY_FAILURE} (EX_TEMPFAIL)  the message is released
  any other  the message is released; with --reject-on-failure it is rejected
"""


class Command(NamedTuple):
    """A command, `linger NAME ARGUMENTS`; `run` returns the exit status, None for 0."""

    name: str
    summary: str
    example: str
    run: Optional[Callable[[Client, argparse.Namespace], Optional[int]]]  # None: see `local`
    arguments: Sequence[_Argument] = ()
    nothing: str = ""  # meaning of the exit status 1; empty: there is none
    columns: Sequence[str] = ()  # of the lines that it writes
    excludes: Sequence[tuple[str, str, str]] = ()  # two arguments, and why not both
    requires: Sequence[tuple[str, str, str]] = ()  # an argument, the one it needs, and why
    notes: str = ""  # more for --help
    local: Optional[Callable[[argparse.Namespace], int]] = None  # in place of `run`: no client


# fmt: off
COMMANDS = (
    Command("serve", "run the server; the default without a command",
            "linger serve --port 8989", None),
    Command("post", "post a message to a channel, or one per line, and write its id",
            "linger post jobs 'Do this!'", _post,
            (CHANNEL, BODY, _flag("--lines", "post each line of standard input as a message"),
             TYPE, *_parameters(ALL_PARAMETERS), JSON), columns=("id",),
            excludes=(("--lines", "--unique", "all lines but the first would be duplicates"),),
            requires=(DEDUP_FOR_ALONE,)),
    Command("get", "take messages and write their bodies",
            "linger get jobs --ack", _get,
            (CHANNELS_IN_ORDER,
             _seconds("--wait", "maximum wait for each message (default: 0)", 0, MAX_WAIT),
             _number("--count", "N", "maximum number of messages (default: 1)"),
             _flag("--follow", "take messages until interrupted, across server restarts"),
             _flag("--ack", "delete each message after it was written"),
             _flag("--auto", "delete each message on delivery"), TIMEOUT, JSON),
            nothing="no message came",
            excludes=(("--ack", "--auto", "a message is deleted once"),
                      ("--auto", "--timeout", "a message deleted on delivery is never hidden"),
                      ("--follow", "--wait", "--follow waits for as long as it takes"))),
    Command("work", "run a command for each message, with the body as its standard input",
            "linger work jobs --once -- cat",
            lambda client, options: Worker(client, options).run(),
            (CHANNELS_IN_ORDER,
             _argument("command", metavar="COMMAND", nargs="+",
                       help="command to run, with its arguments"),
             _number("-j", "N", "number of commands that run at a time", 1, MAX_JOBS, default=1),
             _flag("--once", "stop when there is no message"),
             _number("--count", "N", "stop after this number of messages"),
             _seconds("--time-limit", "maximum run time of a command, which is then killed, and its"
                      " message released", 1, MAX_TIMER),
             _seconds("--retry-delay", "delay after a failure, for messages without backoff",
                      0, default=FAILURE_DELAY),
             _flag("--reject-on-failure", "reject a message after a failure"),
             _flag("--reply", "reply to a message that was called with the command's output"),
             _argument("-v", "--verbose", dest="verbose", action="store_true",
                       help="write a line when a command ends")),
            nothing="no message came, with --once", notes=WORK_NOTES),
    Command("publish", "publish a message on a topic, and write the channels and ids of its copies",
            "linger publish news 'Have you heard?'", _publish,
            (TOPIC, BODY, TYPE, *_parameters(PUBLISH_PARAMETERS), JSON),
            columns=COPY_COLUMNS, requires=(DEDUP_FOR_ALONE,)),
    Command("subscribe", "subscribe a channel to a topic, with parameters for its copies",
            "linger subscribe mail news --linger 3600",
            _subscribe, (CHANNEL, TOPIC, PATTERN, SINCE, *_parameters(MESSAGE_PARAMETERS)),
            excludes=(("--pattern", "--since", "a topic keeps publications, not a pattern"),)),
    Command("unsubscribe", "end a subscription", "linger unsubscribe mail news",
            lambda client, options: (
                client.unsubscribe_pattern if options.pattern else client.unsubscribe
            )(options.channel, options.topic),
            (CHANNEL, TOPIC, PATTERN)),
    Command("peek", "list messages of a channel without taking them",
            "linger peek jobs --state ready", _peek,
            (CHANNEL, _argument("--state", choices=STATES, help="only messages in this state"),
             _number("--count", "N", "maximum number of messages", 1, MAX_BATCH, default=LISTED),
             _number("--after", "ID", "start after this message", 0), JSON),
            nothing="there are no messages", columns=MESSAGE_COLUMNS),
    Command("tail", "write what happens to the messages of a channel, a line for each event",
            "linger tail jobs", _tail,
            (CHANNEL, _number("--count", "N", "stop after this number of events"), JSON),
            columns=TAIL_COLUMNS),
    Command("listen", "write what is published on a topic, a line for each message",
            "linger listen news", _tail,
            (TOPIC, PATTERN, SINCE, _number("--count", "N", "stop after this number of messages"),
             JSON),
            columns=LISTEN_COLUMNS),
    Command("show", "write a message without taking it", "linger show 1", _show, (ID, JSON),
            nothing=NO_MESSAGE),
    Command("delete", "delete messages that are done", "linger delete 1 --lease 1", _delete,
            (IDS_TO_DELETE, LEASE), nothing="one of the messages is missing; others are deleted"),
    Command("touch", "restart the visibility timeout of a message in flight",
            "linger touch 1 --timeout 600",
            lambda client, options: client.touch(options.id, options.timeout, options.lease),
            (ID, LEASE, TIMEOUT), nothing=NO_MESSAGE),
    Command("release", "return a message in flight to its channel",
            "linger release 1 --delay 60 --reason 'out of paper'",
            lambda client, options: client.release(
                options.id, options.delay, options.reason, options.lease, options.uncounted),
            (ID, LEASE, REASON,
             _seconds("--delay", "time until it is ready, in place of its backoff", 0),
             _flag("--uncounted", "as if it had not been delivered; needs --lease")),
            nothing=NO_MESSAGE,
            requires=(("--uncounted", "--lease", "it undoes that delivery"),)),
    Command("reject", "move a message in flight to its dead channel, or delete it",
            "linger reject 1 --reason 'no such order'",
            lambda client, options: client.reject(options.id, options.reason, options.lease),
            (ID, LEASE, REASON), nothing=NO_MESSAGE),
    Command("redrive", "move messages of a dead channel back, and write how many",
            "linger redrive failed --count 10", _redrive,
            (_argument("channel", metavar="CHANNEL", nargs="?", help="name of the channel"),
             _number("--id", "ID", "move this message only, in place of a channel's", 0),
             _number("--count", "N", "maximum number of messages (default: all)"), JSON,
             _argument("--to", metavar="TARGET", help="channel, in place of their origin")),
            nothing="there was no message to move", columns=("moved",)),
    Command("change", "change a message that waits", "linger change 1 --priority -1 --delay 0",
            lambda client, options: client.change(
                options.id, **_given_parameters(options, CHANGE_PARAMETERS)),
            (ID, *_parameters(CHANGE_PARAMETERS)), nothing=NO_MESSAGE),
    Command("call", "post a message, wait for the reply to it, and write that",
            "linger call sums '2 + 3' --wait 10", _call,
            (CHANNEL, BODY, _seconds("--wait", "maximum wait for the reply", 0, MAX_WAIT,
                                     default=CALL_WAIT), TYPE, *_parameters(CALL_PARAMETERS)),
            nothing="no reply came in time"),
    Command("reply", "answer a message that was called, and delete it", "linger reply 1 5",
            lambda client, options: client.reply(
                options.id, _read_body(options), options.type, options.lease),
            (ID, BODY, TYPE, LEASE), nothing=NO_MESSAGE),
    Command("drained", "wait until a channel holds no message",
            "linger drained jobs --wait 600 && echo done",
            lambda client, options: int(not client.drained(options.channel, options.wait)),
            (CHANNEL, _seconds("--wait", "maximum wait", 0, MAX_WAIT, default=DEFAULT_WAIT)),
            nothing="it still holds messages"),
    Command("drain", "delete all messages of a channel", "linger drain jobs --yes", _drain,
            (CHANNEL, _flag("--yes", "do not ask for confirmation")), nothing="not confirmed"),
    Command("channels", "list the channels, with the age of the oldest message in seconds",
            "linger channels", _channels, (JSON,), nothing="there are no channels",
            columns=CHANNEL_COLUMNS),
    Command("topics", "list the topics, or those of a channel", "linger topics", _topics,
            (_argument("channel", metavar="CHANNEL", nargs="?", help="only its topics"), JSON),
            nothing="there are no topics", columns=("topic",)),
    Command("retention", "let a topic keep publications, or show what it keeps",
            "linger retention news --keep 100 --keep-for 86400", _retention,
            (TOPIC, _number("--keep", "N", "keep the last ones", 1, MAX_KEPT),
             _seconds("--keep-for", "time to keep each of them"),
             _flag("--clear", "keep none any more, and delete those kept"), JSON),
            nothing="it keeps none", columns=PAIR_COLUMNS,
            excludes=[("--clear", option, "they are kept or deleted")
                      for option in ("--keep", "--keep-for")]),
    Command("publications", "list what a topic has kept", "linger publications news --since 1h",
            _publications,
            (TOPIC, SINCE, _number("--count", "N", "maximum number", 1, MAX_BATCH, default=LISTED),
             JSON),
            nothing="there are none", columns=PUBLICATION_COLUMNS),
    Command("patterns", "list the patterns with subscriptions, or those of a channel",
            "linger patterns", _patterns,
            (_argument("channel", metavar="CHANNEL", nargs="?", help="only its patterns"), JSON),
            nothing="there are no patterns", columns=("pattern",)),
    Command("subscribers", "list the channels subscribed to a topic, or to patterns that match it",
            "linger subscribers news", _subscribers, (TOPIC, JSON),
            nothing="no channel is subscribed", columns=SUBSCRIBER_COLUMNS),
    Command("stats", "show the counters of the server", "linger stats", _stats,
            (_seconds("--watch", "time between updates, with rates (default: 2)",
                      1, MAX_TIMER, nargs="?", const=2), JSON),
            columns=PAIR_COLUMNS, notes=f"columns with --watch: {', '.join(RATE_COLUMNS)}\n"),
    Command("settings", "show the settings of a channel, or replace all of them",
            "linger settings jobs --deliver 5 --dead failed", _settings,
            (CHANNEL, _flag("--clear", "remove all settings"),
             _flag("--keep", "change those that are given, and leave the others"),
             *_parameters(CHANNEL_PARAMETERS), JSON),
            nothing="nothing is set", columns=PAIR_COLUMNS,
            excludes=[("--clear", f"--{parameter.name}", "settings are removed or replaced")
                      for parameter in CHANNEL_PARAMETERS]
                     + [("--clear", "--keep", "settings are removed or changed")]),
    Command("pause", "stop the delivery of a channel's messages", "linger pause jobs --for 600",
            lambda client, options: client.pause(options.channel, options.seconds),
            (CHANNEL, _seconds("--for", "length of the pause (default: until resume)",
                               dest="seconds"))),
    Command("resume", "end a pause", "linger resume jobs",
            lambda client, options: client.resume(options.channel), (CHANNEL,)),
    Command("schedule", "have a message posted at certain times, or show such a schedule",
            "linger schedule nightly jobs 'Report' --cron '0 3 * * *' --tz Europe/Berlin",
            _schedule,
            (_argument("name", metavar="NAME", help="name of the schedule"),
             _argument("channel", metavar="CHANNEL", nargs="?", help="channel of the messages"),
             BODY, TYPE,
             _argument("--cron", metavar="TIMES", help="minute, hour, day of the month, month, and"
                       " day of the week, as '0 3 * * *', or as '@daily'"),
             _argument("--tz", metavar="ZONE", help="time zone of --cron (default: UTC)"),
             _seconds("--every", "time between two posts, in place of --cron", 1, MAX_EVERY),
             _flag("--no-catch-up", "post nothing for times that were missed"),
             *_parameters(SCHEDULE_PARAMETERS),
             _flag("--run", "post its message now, and write the id"),
             _flag("--delete", "delete it"), JSON),
            nothing="there is no such schedule", columns=PAIR_COLUMNS,
            excludes=(("--run", "CHANNEL", "the schedule has one"),
                      ("--delete", "CHANNEL", "only the NAME is needed"),
                      ("--delete", "--run", "these are two calls"),
                      ("--cron", "--every", "these are two ways to say when")),
            requires=[("--tz", "--cron", "it has no other use"),
                      *((option, "CHANNEL", "without one, a schedule is shown and not set")
                        for option in ("--cron", "--every", "--no-catch-up", "--type",
                                       *(flags[0] for flags, _ in
                                         _parameters(SCHEDULE_PARAMETERS))))]),
    Command("schedules", "list the schedules", "linger schedules", _schedules, (JSON,),
            nothing="there are no schedules", columns=SCHEDULE_COLUMNS_SHOWN),
    Command("dump", "write the messages of all channels, or of some, for load",
            "linger dump jobs > jobs.ndjson", _dump,
            (_argument("channels", metavar="CHANNEL", nargs="*", help="only these channels"),),
            nothing="there are no messages"),
    Command("load", "post the output of dump from standard input, and write how many messages",
            "linger load < jobs.ndjson", _load, (JSON,), columns=("loaded",)),
    Command("backup", "copy the database of the running server to a new file",
            "linger backup copy.db",
            lambda client, options: client.backup(options.file, options.force),
            (_argument("file", metavar="FILE", help="path of the new file"),
             _flag("--force", "replace the file if it exists, unless it is a database in use"))),
    Command("copy", "copy the database of a stopped server, a file or a cluster, to a new one",
            "linger copy linger.db http://node1:4001,node2:4001", None,
            (_argument("source", metavar="FROM", help="path of a file, or URL of a cluster"),
             _argument("target", metavar="TO",
                       help="path of a new file, or URL of a cluster in which nothing is stored")),
            columns=("copied",), local=_copy),
    Command("bench", "measure a temporary server on this machine, or the one at a URL",
            "linger bench --connections 64", None,
            (_argument("server", metavar="URL", nargs="?",
                       help="server to measure (default: a temporary one with an empty database)"),
             _number("--connections", "N", "number of connections, each with a request at a time",
                     1, BENCH_CONNECTIONS, default=8),
             _argument("--seconds", metavar="SECONDS", type=_bench_seconds, default=2.0,
                       help="length of each measurement"),
             _number("--bytes", "N", "size of a message", 1, BENCH_BYTES, default=100),
             _argument("--sync", choices=SYNC_LEVELS,
                       help="sync level of the temporary server (default: full)"),
             _argument("--folder", help="directory for its database (default: the current one)"),
             JSON, *CONNECTION), columns=BENCH_COLUMNS, local=_bench,
            notes="LINGER_TOKEN is used, but LINGER_URL is not: only a server that is named is"
                  " measured.\n",
            excludes=[("URL", "--url", "one server is measured"),
                      *((url, option, f"{option} is for the temporary server")
                        for url in ("URL", "--url") for option in ("--sync", "--folder"))]),
    Command("help", "show the options of the server, or of a command", "linger help get", None,
            (_argument("topic", metavar="COMMAND", nargs="?", help="name of a command"),)),
)
# fmt: on


def _parser_of(command: Command) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"linger {command.name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=_epilog(command),
    )
    for flags, settings in _arguments_of(command):
        parser.add_argument(*flags, **settings)
    return parser


def _epilog(command: Command) -> str:
    """Returns the end of a command's help: columns, exit statuses, variables, an example."""
    lines = ["exit status:", "  0  done"]
    if command.nothing:
        lines.append(f"  1  {command.nothing}")
    lines.append("  2  wrong use, or it cannot be done: a line on standard error says why")
    if command.run or command.local:
        lines.append("  128 + n  ended by signal n; SIGPIPE if the reader of the output is gone")
    if command.columns:
        lines[:0] = ["columns of the output, with tabs between:",
                     f"  {', '.join(command.columns)}", ""]  # fmt: skip
    variables = []
    if command.run:
        variables.append("  LINGER_URL, LINGER_TOKEN  in place of --url and --token")
    if len(command.columns) > 1:
        variables.append(
            "  NO_COLOR  write the headings of a table at a terminal without bold type"
        )
    if variables:
        lines += ["", "environment:", *variables]
    notes = [command.notes] if command.notes else []
    return "\n".join([*notes, *lines, "", "example:", f"  {command.example}"])


def _parse(command: Command, arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments of a command; exits if they are wrong, and after --help."""
    parser = _parser_of(command)
    options = parser.parse_intermixed_args(arguments)
    if "command" in options and "--" in arguments:  # argparse removes a second `--` from it
        options.command = list(arguments[arguments.index("--") + 1 :])
    given = set[str]()
    for flags, settings in _arguments_of(command):
        name = settings.get("dest") or flags[0].lstrip("-").replace("-", "_")
        value = getattr(options, name)
        if value is not None and value is not settings.get("default", False):  # 0 is a value
            given.update((*flags, settings.get("metavar", "")))
    for one, other, reason in command.excludes:
        if {one, other} <= given:
            raise BadRequest(f"{one} and {other} exclude each other: {reason}")
    for one, needed, reason in command.requires:
        if one in given and needed not in given:
            raise BadRequest(f"{one} needs {needed}: {reason}")
    return options


def _open_standard_streams() -> None:
    """Opens /dev/null for those of the standard streams that are closed.

    Otherwise the next file or connection would become one, also of the commands of a worker.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(opened, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115


def _exit_on_signal(number: int, _: object) -> None:
    """Ends a command gracefully, with the exit status that a shell uses."""
    raise SystemExit(128 + number)


def _find_command(name: str) -> Command:
    command = {command.name: command for command in COMMANDS}.get(name)
    if command is None:
        raise BadRequest(f"there is no command {name}; linger --help lists the commands")
    return command


def _arguments_of(command: Command) -> tuple[_Argument, ...]:
    """Returns all arguments of a command."""
    if command.run:
        return (*command.arguments, *CONNECTION)
    if command.name != "serve":
        return tuple(command.arguments)
    switch = {"action": None, "nargs": "?"}
    names = [(option.name, {} if option.metavar else switch) for option in OPTIONS]
    names += [("config", {}), ("version", {"action": "version"})]
    return tuple(((f"--{name}",), settings) for name, settings in names)


def _split_command(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """Returns the command, and its arguments; without a name it is the server.

    Options may stand before the name: a value, which could look like a name, is passed over.
    """
    settings_of = {
        flag: settings for c in COMMANDS for flags, settings in _arguments_of(c) for flag in flags
    }
    names = {command.name for command in COMMANDS}
    flags, position = [], 0
    while position < len(arguments) and arguments[position].startswith("-"):
        argument = arguments[position]
        flag = argument.partition("=")[0] if argument.startswith("--") else argument[:2]
        flags.append(flag)
        settings = settings_of.get(flag, {"action": "store_true"})
        following = arguments[position + 1 : position + 2]
        other = following and (following[0] in names or following[0].startswith("-"))
        optional = settings.get("nargs") == "?" and other
        if flag == argument and not settings.get("action") and following and not optional:
            position += 1
        position += 1
    rest = list(arguments)
    name = rest.pop(position) if position < len(arguments) else ""
    command = _find_command(name or "serve")
    known = {"-h", "--help"}.union(*(flags for flags, _ in _arguments_of(command)))
    for flag in flags:
        if flag not in known:
            help = f"linger {name} --help lists them" if name else "linger --help lists them"
            raise BadRequest(f"{name or 'the server'} has no option {flag}; {help}")
    return command, rest


def _run(arguments: Sequence[str]) -> int:
    """Runs a command; returns its exit status."""
    command, rest = _split_command(arguments)
    if sys.stdout is None and command.name not in ("serve", "work"):
        raise BadRequest("standard output is closed: to discard it, use /dev/null")
    if command.name == "help":
        command, rest = _find_command(_parse(command, rest).topic or "serve"), ["--help"]
    if command.name == "serve":
        return run_server(rest, "\n".join(f"  {c.name:12} {c.summary}" for c in COMMANDS))
    options = _parse(command, rest)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    signal.signal(signal.SIGINT, _exit_on_signal)
    try:
        if command.run is None:
            return command.local(options) if command.local else 0
        with open_client(options.url, options) as client:
            return command.run(client, options) or 0
    except NotFound as error:
        if command.nothing:
            raise
        raise LingerError(str(error)) from error  # the status 1 has no meaning then


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs a command, or the server; returns the exit status.

    0: done.  1: nothing found.  2: failed; the reason is a line on standard error.  128 + n: ended
    by signal n, as a shell reports it, for SIGINT, SIGTERM, and SIGPIPE if the reader of the
    output is gone.
    """
    try:
        _open_standard_streams()
        return _run(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # or Python reports it again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    except LingerError as error:
        log(f"linger: {error}")
        return 1 if isinstance(error, NotFound) else 2
    except OSError as error:
        place = "" if error.filename is None else f"{os.fspath(error.filename)}: "
        log(f"linger: {place}{reason_of(error)}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
