{{/* What names and selects everything of this release; `party` is master or a node's name. */}}
{{- define "shared-encoder.labels" -}}
app.kubernetes.io/name: shared-encoder
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "shared-encoder.image" -}}
{{- $name := last (splitList "/" .name) -}}
{{ .name }}{{ if not (or (contains ":" $name) (contains "@" $name)) }}:{{ .Chart.AppVersion }}{{ end }}
{{- end }}

{{/* A party's StatefulSet with its volume, and the Service that names it. Arguments: root, party, role, image,
credentialsSecret, args, storage, resources, nodeSelector, tolerations; of a node: claim; of the master: operators. */}}
{{- define "shared-encoder.party" -}}
{{- $root := .root -}}
{{- $name := printf "%s-%s" $root.Release.Name .party -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  labels:
    {{- include "shared-encoder.labels" $root | nindent 4 }}
    shared-encoder/party: {{ .party }}
spec:
  clusterIP: None
  selector:
    {{- include "shared-encoder.labels" $root | nindent 4 }}
    shared-encoder/party: {{ .party }}
  ports:
    - {name: http, port: 9464, targetPort: http}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $name }}
  labels:
    {{- include "shared-encoder.labels" $root | nindent 4 }}
    shared-encoder/party: {{ .party }}
    shared-encoder/role: {{ .role }}
spec:
  # one of each: a second one would wait for the lock of the first
  replicas: 1
  serviceName: {{ $name }}
  selector:
    matchLabels:
      {{- include "shared-encoder.labels" $root | nindent 6 }}
      shared-encoder/party: {{ .party }}
  template:
    metadata:
      labels:
        {{- include "shared-encoder.labels" $root | nindent 8 }}
        shared-encoder/party: {{ .party }}
        shared-encoder/role: {{ .role }}
      annotations:
        # a changed configuration is read at a start
        shared-encoder/config: {{ $root.Values.config | sha256sum | trunc 16 | quote }}
        prometheus.io/scrape: "true"
        prometheus.io/port: "9464"
    spec:
      # a Service called shared-encoder would put variables into the environment that look like settings
      enableServiceLinks: false
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
      {{- with $root.Values.images.pullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
      securityContext:
        runAsNonRoot: true
        runAsUser: {{ $root.Values.runAsUser }}
        runAsGroup: 0
        fsGroup: {{ $root.Values.fsGroup }}
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile: {type: RuntimeDefault}
      containers:
        - name: {{ .role }}
          image: {{ include "shared-encoder.image" (dict "name" .image "Chart" $root.Chart) }}
          imagePullPolicy: {{ $root.Values.images.pullPolicy }}
          args:
            - {{ .role }}
            - --http=0.0.0.0:9464
            - --json
            {{- if $root.Values.config }}
            - --config=/etc/shared-encoder/config.toml
            {{- end }}
            {{- range .args }}
            - {{ . | quote }}
            {{- end }}
          env:
            - {name: SHARED_ENCODER_CREDENTIALS, value: /credentials/credentials.toml}
            {{- with .operators }}
            - name: SHARED_ENCODER_MASTER__OPERATORS
              value: {{ . | toJson | quote }}
            {{- end }}
          ports:
            - {name: http, containerPort: 9464}
          # loading torch and making version 0 of a large encoder
          startupProbe:
            httpGet: {path: /healthz, port: http}
            periodSeconds: 5
            failureThreshold: 60
          livenessProbe:
            httpGet: {path: /healthz, port: http}
            periodSeconds: 20
            failureThreshold: 3
          readinessProbe:
            httpGet: {path: /readyz, port: http}
            periodSeconds: 10
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL]}
          resources:
            {{- toYaml .resources | nindent 12 }}
          volumeMounts:
            - {name: state, mountPath: /var/lib/shared-encoder}
            - {name: credentials, mountPath: /credentials, readOnly: true}
            - {name: scratch, mountPath: /tmp}
            {{- if $root.Values.config }}
            - {name: config, mountPath: /etc/shared-encoder, readOnly: true}
            {{- end }}
            {{- with .claim }}
            - {name: corpus, mountPath: /corpus, readOnly: true}
            {{- end }}
      volumes:
        - name: credentials
          # root's, and readable for the pod's group
          secret: {secretName: {{ .credentialsSecret }}, defaultMode: 0440}
        - name: scratch
          emptyDir: {}
        {{- if $root.Values.config }}
        - name: config
          configMap: {name: {{ $root.Release.Name }}-config}
        {{- end }}
        {{- with .claim }}
        - name: corpus
          persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
        {{- end }}
      {{- with .nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
  # what a party keeps outlives the release: its log, its part of the encoder, what it owes
  persistentVolumeClaimRetentionPolicy: {whenDeleted: Retain, whenScaled: Retain}
  volumeClaimTemplates:
    - metadata:
        name: state
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .storage.storageClassName }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests:
            storage: {{ .storage.size }}
{{- end }}
