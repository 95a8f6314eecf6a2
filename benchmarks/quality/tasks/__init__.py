"""The tasks, one file each; a file names its tasks in ``TASKS``."""

from benchmarks.quality.tasks import (
    again,
    code_completion,
    common_words,
    conversation,
    few_shot,
    frequent_words,
    instructions,
    key_value,
    many_shot,
    multi_document,
    needle,
    niah,
    question_first,
    questions,
    variable_tracking,
)

_FIRST = (needle, multi_document, few_shot, code_completion)
_RULER = (niah, variable_tracking, common_words, frequent_words, questions)
_OTHERS = (key_value, many_shot, question_first, instructions, conversation)

TASKS = {task.name: task for module in _FIRST + _RULER + _OTHERS for task in module.TASKS}
AGAIN = {task.name: task for task in again.TASKS}  # of the part ``reuse`` alone
