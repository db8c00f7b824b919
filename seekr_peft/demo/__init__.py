"""The embedded demo: a tiny base model, four short tasks that contradict each other, and the comparison of methods on
them.

``train_base`` made the base that lies in ``base``; ``run`` trains on it. Importing this folder costs no torch.
"""

from ..model.base_files import DEMO_BASE as BASE_PATH

__all__ = ["BASE_PATH"]
