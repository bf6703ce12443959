"""Makes `import blackpoint` mean the code in the folder above this one, whatever is installed.

So a checkout runs itself and a run's frozen copy runs itself, whatever the working directory holds.
"""

import sys
from pathlib import Path
from types import ModuleType

sys.modules["blackpoint"] = code = ModuleType("blackpoint")
code.__path__ = [str(Path(__file__).resolve().parents[1])]
