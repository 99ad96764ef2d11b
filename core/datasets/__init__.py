"""Training files: many formats in, one kind of row out.

    report = check_file(path, on_progress=print)      # everything that is wrong with a file, in words
    for conversation in read_rows(path):              # the rows of a good one; raises InvalidDataset at a bad row
        for message in conversation.messages:
            message.role, message.content, message.train

Containers (`container.py`): one JSON object a line, or one JSON array of objects. Formats (`formats.py`), told by the
keys of each row: OpenAI chat, prompt and completion, Alpaca, ShareGPT. Both functions follow the same rules: a file
reads to its end if and only if its report is `ok`.

The policy: a system message stands first or nowhere; at least one assistant turn trains, and none that trains is empty.
An assistant turn at the start, two turns of one role in a row, a user turn at the end, doubled rows and unfilled
`{{placeholders}}` are allowed and warned about. One bad row refuses the file, as it does at OpenAI: to skip it in
silence would train on other data than the user sent.
"""

from core.datasets.check import Report, check_file
from core.datasets.conversation import Conversation, Message
from core.datasets.problem import Problem
from core.datasets.reading import read_rows

__all__ = ["Conversation", "Message", "Problem", "Report", "check_file", "read_rows"]
