# How the platform calls the image. exec: the entry point is started for each case; invoke: it is a server. The label
# says which, so each is an image of its own; but for these last lines they are the same.
ARG API_METHOD=exec

# CUDA 12.6 is the newest that still serves a T4 (sm_75), the platform's usual GPU.
FROM --platform=linux/amd64 pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime AS common

# The base's Python refuses pip outside a virtual environment (PEP 668). This one sees the base's packages, and so takes
# its torch with CUDA as it is; pip itself, too, is the base's.
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv --system-site-packages --without-pip /opt/venv
COPY requirements.txt /opt/app/
RUN python -m pip install --no-cache-dir --requirement /opt/app/requirements.txt \
    && if ls -d /opt/venv/lib/python3*/site-packages/torch 2>/dev/null; then echo "a second torch" >&2; exit 1; fi

# A user with a name and a home, as the platform asks for; the image runs as any other just as well: everything is
# readable by all, and whatever libraries want to store goes to /tmp. Nothing needs to be stored: torch makes its folder
# for compiled code although nothing is compiled, so that one is there already, and it also runs without any /tmp.
RUN useradd --system --user-group --no-log-init --no-create-home --home-dir /tmp user && mkdir /opt/torchinductor
ENV HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    TORCHINDUCTOR_CACHE_DIR=/opt/torchinductor \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

WORKDIR /opt/app
COPY LICENSE ./
COPY weights weights
COPY imagefiles imagefiles
COPY resultpages resultpages
# The viewer on the pages: fetched with an npm that goes again. Where it cannot be had, pages have still pictures only.
COPY requirements-viewer.txt ./
RUN python -m pip install --no-cache-dir --target /tmp/npm --requirement requirements-viewer.txt \
    && PYTHONPATH=/tmp/npm NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt python -m resultpages.fetch \
    && rm -rf /tmp/npm /tmp/.npm /tmp/node-compile-cache
COPY algorithm algorithm
# The loops are compiled once, here, for every processor with AVX2: a read-only container could not keep them.
RUN NUMBA_CACHE_DIR=/opt/loops NUMBA_CPU_NAME=x86-64-v3 NUMBA_CPU_FEATURES= \
    python -c "import algorithm.geometry.warp_loop, algorithm.objective.correlation_kernels"
ENV LUNGREG_LOOPS=/opt/loops
RUN chmod -R a+rX /opt/app /opt/loops

# The entry point is found from any folder (Apptainer starts in the caller's, whatever WORKDIR says), and what lies in
# that folder is not taken for a module.
ENV PYTHONPATH=/opt/app \
    PYTHONSAFEPATH=1

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="lung-registration" \
      org.opencontainers.image.description="Lung CT registration by a multilevel cascade of U-Nets" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION
USER user

FROM common AS api-exec
LABEL org.grand-challenge.api-method=exec
ENTRYPOINT ["python", "-m", "algorithm"]

FROM common AS api-invoke
LABEL org.grand-challenge.api-method=invoke
EXPOSE 4743
ENTRYPOINT ["python", "-m", "algorithm", "serve", "--host", "0.0.0.0"]

FROM api-$API_METHOD
