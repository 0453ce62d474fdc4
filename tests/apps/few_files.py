"""An application in a worker that may have few descriptors: as many as FEW_FILES says."""

import os
import resource

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (int(os.environ["FEW_FILES"]), hard))


async def app(request):
    return "hello"
