"""The tasks, one file each; a file names its tasks in ``TASKS``."""

from benchmarks.quality.tasks import code_completion, few_shot, multi_document, needle

TASKS = {
    task.name: task
    for module in (needle, multi_document, few_shot, code_completion)
    for task in module.TASKS
}
