# A server: docker build -t deepseek-jax . ; a GPU's: docker build --build-arg EXTRAS=serve,cuda13 -t deepseek-jax .
FROM python:3.12-slim
ARG EXTRAS=serve
# what is compiled is kept in .cache: mount a volume there, and the next container starts warm
RUN useradd --create-home deepseek && install -d -o deepseek -g deepseek /home/deepseek/.cache
COPY . /source
RUN pip install --no-cache-dir "/source[${EXTRAS}]" && rm -rf /source
USER deepseek
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# SIGTERM reaches the server itself, which lets answers finish
ENTRYPOINT ["deepseek-jax", "serve"]
CMD ["/model", "--host", "0.0.0.0"]
