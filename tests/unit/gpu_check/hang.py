"""An import that does not end within a test's deadline."""

import time

time.sleep(3600)
